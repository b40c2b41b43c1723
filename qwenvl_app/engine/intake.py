"""Requests to sequences, on the threads that ask."""

from __future__ import annotations

from qwenvl_app.engine.detokenizer import Detokenizer
from qwenvl_app.engine.inputs import Inputs, prepare
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.prefix_cache import Prefix, PrefixCache, image_key
from qwenvl_app.engine.rendering import Renderer
from qwenvl_app.engine.runner import Runner
from qwenvl_app.engine.sampling import Sampler
from qwenvl_app.engine.scheduler import Scheduler
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.errors import TooLarge
from qwenvl_app.generation import GenerationRequest


class Intake:
    """Makes a ``Sequence`` of a request, on any thread. ``ends``: tokens that end an answer."""

    def __init__(
        self,
        loaded: LoadedModel,
        runner: Runner,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        max_new_tokens: int,
    ):
        self._loaded, self._runner = loaded, runner
        self._scheduler, self._prefixes = scheduler, prefixes
        self._most = max_new_tokens
        self._salt = repr(sorted(loaded.patcher.processor.to_dict().items()))
        self.ends = frozenset(loaded.model.generation_config.eos_token_id)

    def __call__(self, request: GenerationRequest, arrived: float) -> Sequence:
        """Raises TooLarge for one that could never fit, and BadSchema, before pixels are read."""
        loaded, sampling = self._loaded, request.sampling
        inputs = prepare(loaded, request)
        free = self._free(inputs)
        reasoning = inputs.reasoning
        until = reasoning.open_until if reasoning else None
        matcher = loaded.grammars.matcher(request.constraint, until)
        prefix = self._find_prefix(request, inputs)
        patcher = loaded.patcher.within(*request.pixels)
        for image, span in zip(request.images, inputs.images, strict=True):
            if prefix is None or span.tokens.stop > prefix.length:
                span.pixels = patcher.patches(image)
        most = self._most
        limit = min(sampling.max_new_tokens or most, most, free)
        defaults = loaded.model.generation_config
        sampler = Sampler(sampling, defaults, inputs.ids, self._runner.device, matcher)
        detokenizer = Detokenizer(loaded.tokenizer, reasoning)
        renderer = Renderer(detokenizer, sampling.stop, loaded.grammars.spellings, self.ends)
        return Sequence(request, inputs, sampler, limit, renderer, arrived, prefix)

    def look_again(self, sequence: Sequence) -> None:
        """While it waited, what it goes on from may have been computed for somebody else.

        For the engine's thread, before anything is computed for ``sequence``.
        """
        if sequence.inputs.prefix_key is None:
            return
        found = self._prefixes.peek(sequence.inputs.text())
        if found and (sequence.prefix is None or found.length > sequence.prefix.length):
            sequence.prefix = found
            for image in sequence.inputs.images:
                if image.tokens.stop <= found.length:
                    image.pixels = None

    def _free(self, inputs: Inputs) -> int:
        """The most tokens that an answer may have: at least one. Raises TooLarge."""
        patches = sum(image.patches for image in inputs.images)
        longest = min(self._runner.max_length, self._scheduler.longest(patches))
        if (free := longest - len(inputs.ids)) < 1:
            raise TooLarge(
                f"图片和提示词共 {len(inputs.ids)} 个 token，超过 {max(0, longest - 1)} 个的限制。"
            )
        return free

    def _find_prefix(self, request: GenerationRequest, inputs: Inputs) -> Prefix | None:
        """What was kept of an earlier request that begins as this one does."""
        layout, end = self._runner.layout, inputs.images_end
        if layout.bytes(end or len(inputs.ids), 1) > self._prefixes.budget:
            return None
        for image, span in zip(request.images, inputs.images, strict=True):
            span.key = image_key(image, f"{self._salt} {span.grid}")
        inputs.boundary = end if layout.states else 0
        text = inputs.text()
        pictures = text.first(end)
        inputs.prefix_key = inputs.owner, pictures.ids.tobytes(), pictures.pictures
        return self._prefixes.get(text)
