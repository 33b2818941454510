"""LPIPS and CLIP score of pictures, from libraries and weights that are installed.

Nothing is downloaded: a missing library or file raises MetricMissing, which says how to get it.
Sources: LPIPS arXiv 1801.03924, CLIP score arXiv 2104.08718.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ..markdown import bullets

Backbone = Literal["alex", "squeeze"]

# The backbone whose LPIPS the literature reports, and a CLIP that comes as safetensors.
LPIPS_BACKBONE: Backbone = "alex"
CLIP_MODEL = "openai/clip-vit-large-patch14"
# Where torchvision keeps each backbone that LPIPS can use, and what builds it.
_BACKBONES: dict[Backbone, tuple[str, str]] = {
    "alex": ("alexnet", "AlexNet_Weights"),
    "squeeze": ("squeezenet1_1", "SqueezeNet1_1_Weights"),
}
_SMALLEST = 64
# Nothing went wrong where a metric is left out.
_OPTIONAL = "left out, optional: "
_CLIP_FILES = ("*.json", "*.txt", "model.safetensors")


class MetricMissing(Exception):
    """A library or a file of weights is not installed; the message says how to get it."""


def perceptual_report(
    teacher: torch.Tensor, student: torch.Tensor, prompts: Sequence[str] | None
) -> str:
    """Pictures [B, H, W, 3] in 0…1, a prompt each or none → a list in Markdown, a metric a line.

    A metric that cannot be computed becomes one sentence: the reason, and what to do.
    """
    lines = []
    try:
        values = lpips(teacher, student, LPIPS_BACKBONE)
        lines.append(f"LPIPS ({LPIPS_BACKBONE}) {_mean(values):.4f}, 0 is identical")
    except MetricMissing as error:
        lines.append(f"{_OPTIONAL}{error}")
    if prompts is None:
        lines.append(f"{_OPTIONAL}CLIP score needs the prompts that the pictures were drawn from.")
        return bullets(lines)
    try:
        scores = clip_scores((teacher, student), prompts, CLIP_MODEL)
        lines.append("CLIP score {:.2f} → {:.2f}, teacher → student".format(*map(_mean, scores)))
    except MetricMissing as error:
        lines.append(f"{_OPTIONAL}{error}")
    return bullets(lines)


@torch.no_grad()
def lpips(a: torch.Tensor, b: torch.Tensor, backbone: Backbone = LPIPS_BACKBONE) -> list[float]:
    """Pictures [B, H, W, 3] in 0…1 → LPIPS of every pair. Raises MetricMissing."""
    try:
        import torchvision.models
        from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
    except ImportError:
        raise MetricMissing("LPIPS needs torchmetrics: pip install torchmetrics") from None
    name, weights = _BACKBONES[backbone]
    url = getattr(torchvision.models, weights).IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not file.is_file():
        raise MetricMissing(
            f"LPIPS needs the weights of its backbone at {file}: download {url} to there, or run "
            f"python -c \"import torchvision; torchvision.models.{name}(weights='IMAGENET1K_V1')\""
        )
    if min(a.shape[1:3]) < _SMALLEST:
        size = f"{a.shape[2]} × {a.shape[1]}"
        raise MetricMissing(f"LPIPS needs pictures of {_SMALLEST} pixels or more, got {size}.")
    pair = [picture.detach().cpu().float().clamp(0, 1).movedim(-1, 1) for picture in (a, b)]
    try:
        values = learned_perceptual_image_patch_similarity(
            *pair, net_type=backbone, normalize=True, reduction="none"
        )
    # A corrupt checkpoint must not discard the other metrics.
    except Exception as error:
        raise MetricMissing(f"LPIPS cannot use {file}: {error!s:.200}") from error
    return values.reshape(-1).tolist()


@torch.no_grad()
def clip_scores(
    batches: Sequence[torch.Tensor], prompts: Sequence[str], model: str = CLIP_MODEL
) -> list[list[float]]:
    """Batches of pictures [B, H, W, 3] in 0…1, a prompt each → 100 · max(cos, 0) of every picture.

    `model` is a repository in the local cache, or a folder. Raises MetricMissing.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise MetricMissing("CLIP score needs transformers: pip install transformers") from None
    folder = _local_folder(model)
    options = {"local_files_only": True}
    try:
        clip = CLIPModel.from_pretrained(folder, use_safetensors=True, **options).eval()
        processor = CLIPProcessor.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise MetricMissing(f"CLIP score cannot use {folder}: {error!s:.200}") from error
    scores = []
    for batch in batches:
        pictures = (batch.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
        inputs = processor(
            text=list(prompts),
            images=list(pictures.movedim(-1, 1)),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=clip.text_model.config.max_position_embeddings,
        )
        found = clip(**inputs)
        cosine = torch.cosine_similarity(found.image_embeds, found.text_embeds)
        scores.append((100 * cosine).clamp_min(0).tolist())
    return scores


def _local_folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError:
        raise MetricMissing(
            f'CLIP score needs {model} in the Hugging Face cache: python -c "from huggingface_hub '
            f"import snapshot_download; snapshot_download('{model}', allow_patterns="
            f'{list(_CLIP_FILES)})"'
        ) from None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
