"""The paper's figure in code: backbones, the text-driven head, and branches of added classes."""
