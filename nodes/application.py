"""What the patched sites of one application share: when they act, and what was said already."""

import logging
import threading
from dataclasses import dataclass, field

from comfy.model_patcher import ModelPatcher

from .sites import ModelSites

log = logging.getLogger(__name__)


@dataclass
class Application:
    """What all patched sites of one application share: when they act, and what was said already."""

    model_sites: ModelSites
    replaced: tuple[str, ...]
    # Fractions of sampling between which the blocks act; None: always.
    percent_range: tuple[float, float] | None = None
    _said: set[str] = field(default_factory=set)
    _run: threading.local = field(default_factory=threading.local)

    @property
    def acts(self) -> bool:
        """Whether blocks act in the model call that this thread is in."""
        return getattr(self._run, "acts", True)

    def say_once(self, key: str, message: str) -> None:
        """Log a warning the first time this application meets `key`."""
        if key not in self._said:
            self._said.add(key)
            log.warning(message)

    def around_model_call(self, executor, x, t, *args, **kwargs):
        """APPLY_MODEL wrapper: note whether this sigma lies within the range, PixArt too."""
        sampling = executor.class_obj.model_sampling
        start, end = (sampling.percent_to_sigma(percent) for percent in self.percent_range)
        before = self.acts
        self._run.acts = end <= float(t.max()) <= start
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            self._run.acts = before

    def before_sampling(self, patcher: ModelPatcher) -> None:
        """ON_PRE_RUN callback: a LoRA may have come after the blocks were applied."""
        if sentence := self.inert_patches(patcher):
            self.say_once("lora", sentence)

    def inert_patches(self, patcher: ModelPatcher) -> str:
        """A sentence on weight patches, as of a LoRA, that replaced layers cannot show; or ""."""
        sites = self.model_sites.sites
        prefixes = tuple(sites[site].weight_prefix for site in self.replaced)
        if not (count := sum(key.startswith(prefixes) for key in patcher.patches)):
            return ""
        return (
            f"{count} LoRA patches on replaced self-attention layers have no effect: those layers "
            "do not run. The LoRA's other patches work."
        )
