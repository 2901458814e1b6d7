"""The models that are collected from: their files checked, rehearsed and loaded, and sessions
on them."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from imatrix.engine import process
from imatrix.engine.batch import choose_in_child
from imatrix.engine.interface import MemoryUses, NativeModel
from imatrix.engine.layers import fit_layers, sums_size
from imatrix.engine.loading import Loader
from imatrix.engine.model_files import ModelFiles
from imatrix.engine.placement import Placement, advise_on_devices, on_cpu
from imatrix.engine.rehearsal import Rehearsal
from imatrix.engine.rehearsal import rehearse as rehearse_in_child
from imatrix.engine.sessions import OpenSession
from imatrix.engine.settings import (
    ALL,
    Batch,
    Layers,
    ModelOptions,
    SessionSettings,
    Wanted,
    usual,
)
from imatrix.engine.tokenizer import ModelTokenizer
from imatrix.errors import EngineDiedError, EngineError, ModelError
from imatrix.model.architectures import (
    check_head,
    check_tables,
)
from imatrix.model.header import ModelFile
from imatrix.text.chats import ChatOptions, Renderer

if TYPE_CHECKING:
    from imatrix.native.engine import DeviceInfo, LoadData

__all__ = ["Models"]


class Models:
    """A trunk, and the file that holds its head: its own or another.

    Args:
        options: which files, and how they are loaded.
        n_ctx: tokens a chunk, to compare with what the model was trained on.
        loader: loads them; None for one of their own. Models that share one share the engine's own
            process, which ends when one of them is freed.

    Attributes:
        loader: as above.
        files: the headers.
        trunk_file, head_file: those of the two files; the same object if there is one.
        head: the loaded model that holds the head; None unless the last load() was asked for it.
        layers: what is on the devices; None until a model is loaded.
        contexts: with n_gpu_layers="auto", bytes that a session's contexts will take on each device.

    Raises:
        FileNotFoundError, ModelError, ValueError: as Collector does.
    """

    def __init__(self, options: ModelOptions, *, n_ctx: int, loader: Loader | None = None) -> None:
        self._options = options
        self.files = ModelFiles.read(options)
        self.trunk_file, self.head_file = self.files.trunk, self.files.head
        self.head: NativeModel | None = None
        self._trunk: NativeModel | None = None
        self._vocabulary: NativeModel | None = None  # the trunk without its weights
        self._with_head = False  # whether the trunk was loaded with the head's tensors
        self.loader = Loader(options.isolate) if loader is None else loader
        self._sessions: weakref.WeakSet[OpenSession] = weakref.WeakSet()
        self._n_ctx = n_ctx
        self.layers: Layers | None = None
        self.contexts: Mapping[str, int] = {}
        self._fitted = False  # whether `layers` was chosen by what there is room for
        tensors = (*self.trunk_file.tensors, *self.head_file.tensors)
        options.placement.warn_of_idle(tensors, self.trunk_file.path.name)
        self._rehearsed: set[SessionSettings] = set()
        self._rehearsed_loads: set[bool] = set()
        self._tokenizer_fault: str | None = None
        self._causal: bool | None = None  # not asked yet

    @property
    def engine(self) -> process.Engine | None:
        """The engine's own process with isolate, once it was needed."""
        return self.loader.process

    # --- before anything is loaded -------------------------------------------

    def rehearse(self, settings: SessionSettings) -> None:
        """Build the graphs of a session with these settings in a child process, unless that was
        done.

        The graphs do not depend on where the model will lie, so the child takes no device from
        whoever uses it.
        """
        if self._options.rehearse and self._as_run(settings) not in self._rehearsed:
            self._learn(rehearse_in_child(*self.files.paths(settings.mtp), settings.mtp, settings))
            self._rehearsed.add(self._as_run(settings))
            self._rehearsed_loads.add(settings.mtp)

    def _as_run(self, settings: SessionSettings) -> SessionSettings:
        """The settings with the larger batch that the child takes if each chunk has to be decoded
        in one piece, as far as that is known."""
        return settings.with_whole_chunks() if self._causal is False else settings

    def _learn(self, found: Rehearsal | None) -> None:
        """What a rehearsal found out."""
        self._tokenizer_fault = None if found is None else found.tokenizer_fault
        if found is not None and found.causal is not None:
            self._causal = found.causal

    @property
    def knows_causal(self) -> bool:
        """Whether `causal` is known by now, so that nothing has to be loaded for it."""
        return self._causal is not None

    @property
    def causal(self) -> bool:
        """Whether a token of the trunk sees only those before it, as the engine says. If no
        rehearsal has found out yet, a model without weights is loaded and asked.

        Raises:
            ModelError: it does not decode text, or cannot be loaded.
            EngineError, MemoryError: there can be no context.
        """
        if self._causal is None:
            self._drop_dead()
            model = self._trunk or self._vocabulary
            if model is None:
                model = self._load_file(self.trunk_file, False, no_alloc=True, layers=Layers(0))
            self._causal = model.causal()
        return self._causal

    def batch(self, wanted: Wanted) -> Batch:
        """The batch that was wanted, as this model can run it.

        Raises:
            ValueError: it cannot be run.
        """
        if self.causal:
            return wanted.of_causal(self._n_ctx)
        return wanted.of_whole(
            self._n_ctx, f"{self.trunk_file.path.name} ({self.trunk_file.architecture})"
        )

    def check_predicts(self, what: str, cure: str) -> None:
        """That the model predicts the next token.

        Args:
            what, cure: what was asked that needs it, and what to do otherwise; for the message.

        Raises:
            ValueError: its tokens see the next one.
        """
        if not self.causal:
            raise ValueError(
                f"{what}, but the tokens of {self.trunk_file.path.name} "
                f"({self.trunk_file.architecture}) see those after them, so that there is no next "
                f"token to predict: {cure}"
            )

    def choose_batch(self, settings: SessionSettings, most: int) -> Batch:
        """The batch that n_batch="auto" comes to, with at most `most` chunks side by side."""
        layers = self._chosen_layers()
        return choose_in_child(
            *self.files.paths(settings.mtp),
            settings,
            n_gpu_layers=layers.n_gpu_layers,
            placement=self._placed(layers).as_data(),
            mapped=self._maps(self.trunk_file),
            most=most,
            causal=self.causal,
        )

    def check(self, head: bool) -> None:
        """See ModelFiles.check."""
        self.files.check(head, self._n_ctx)

    # --- loaded --------------------------------------------------------------

    def load(
        self, settings: SessionSettings, beside: Mapping[str, int] | None = None
    ) -> NativeModel:
        """The trunk's model; with settings.mtp the head's is in `head`, else None is.

        Args:
            settings: of the session that will be opened; n_gpu_layers="auto" leaves room for it.
            beside: bytes on each device to leave to something else.
        """
        head = settings.mtp
        self._drop_dead()
        if head:
            check_head(self.head_file)
            check_tables(self.head_file)
        check_tables(self.trunk_file)
        bundled = head and self.files.bundled
        more = head and not self._with_head and (self.files.bundled or self._fitted)
        if self._options.rehearse and head not in self._rehearsed_loads:
            self._learn(rehearse_in_child(*self.files.paths(head), head, None))
            self._rehearsed_loads.add(head)
        if self._trunk is None or more:
            self._drop()  # a reload with the head must not hold the model twice
            self._choose_layers(settings, beside or {})
            self._trunk = self._load_file(self.trunk_file, bundled)
            self._with_head = head
        if not head:
            self.head = None
        elif bundled:
            self.head = self._trunk
        elif self.head is None:
            self.head = self._load_file(self.head_file, True)
        return self._trunk

    def loaded(self) -> NativeModel:
        """The trunk's model as it is loaded, or its vocabulary. If neither is, the trunk is loaded
        without the head."""
        if self._trunk is not None:
            return self._trunk
        if self._vocabulary is not None:
            return self._vocabulary
        return self.load(SessionSettings(n_ctx=self._n_ctx, batch=usual(self._n_ctx), n_threads=1))

    def load_vocabulary(self) -> None:
        """Load what tokenizes and describes the model, without its weights, unless more is loaded."""
        self._drop_dead()
        check_tables(self.trunk_file)
        if self._trunk is None and self._vocabulary is None:
            # nothing is to go to a device
            self._vocabulary = self._load_file(self.trunk_file, False, no_alloc=True)

    def open(self, settings: SessionSettings) -> OpenSession:
        """A session on what load() has loaded. It is closed when that is loaded anew or freed."""
        assert self._trunk is not None
        with self._dropping_engine():
            session = OpenSession(self.loader.open(self._trunk, self.head, settings))
        self._sessions.add(session)
        return session

    def free(self) -> None:
        """Close all sessions, let go of all that is loaded, and end the engine's own process."""
        self.loader.close()  # first: a step that is running there ends with it
        self._drop()
        self._with_head = False
        self.layers = None

    def close_sessions(self) -> None:
        """Close what open() has opened: contexts and sums are freed, the models stay."""
        for session in list(self._sessions):
            session.close()
        self._sessions.clear()

    def _drop(self) -> None:
        """Let go of all that is loaded, and of the sessions, which hold on to it."""
        self.close_sessions()
        self._trunk = None
        self._vocabulary = None
        self.head = None

    def tokenizer(self) -> ModelTokenizer:
        """The model as a tokenizer; it loads the model if nothing is loaded."""
        return ModelTokenizer(self.loaded(), self.check_tokenizer)

    def check_tokenizer(self) -> None:
        """That text can be tokenized.

        Raises:
            ModelError: there is no tokenizer, or the engine ends with it.
        """
        if not self.trunk_file.has_tokenizer:
            raise ModelError(
                f"{self.trunk_file.path}: the model has no tokenizer (tokenizer.ggml.model), so text "
                "cannot be tokenized; give token lists, or a file converted with its tokenizer"
            )
        self.loaded()  # the tokenizer is rehearsed with it
        if self._tokenizer_fault is not None:
            raise ModelError(
                f"{self.trunk_file.path}: the engine's tokenizer ends the process with the vocabulary "
                f"of this model: {self._tokenizer_fault}. Give token lists, or convert the model "
                "again with its tokenizer."
            )

    def renderer(self, options: ChatOptions) -> Renderer:
        """Renders chats with the model's own template."""
        model = self.loaded()
        return Renderer(
            model.metadata("tokenizer."), model.token_text, options, str(self.trunk_file.path)
        )

    @property
    def has_gpu(self) -> bool:
        """Whether the engine sees a device to put layers on (with isolate, where it runs)."""
        return any(device["gpu"] for device in self._devices())

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU multiplies everything. If the engine has a GPU it sends large products
        there, also of weights that lie in the host's memory."""
        return self._options.placement.devices == () or not self.has_gpu

    @property
    def machine(self) -> str:
        """What the engine's own process computes with, in words: equal words, equal numbers."""
        devices = ", ".join(each["description"] for each in self._devices() if each["gpu"])
        features = self.loader.features()
        if not devices:
            return features
        placed = self._chosen_layers().describe(self.files.n_blocks)
        return f"{devices}, {placed}, {features}"

    def _devices(self) -> list[DeviceInfo]:
        self._drop_dead()
        return self.loader.devices()

    def _chosen_layers(self) -> Layers:
        assert self.layers is not None  # load() sets it
        return self.layers

    def _placed(self, layers: Layers) -> Placement:
        """The placement, and the experts that `layers` leaves on the CPU."""
        kept = on_cpu("experts", layers.cpu_experts)
        return replace(
            self._options.placement, overrides=(*self._options.placement.overrides, *kept)
        )

    def _choose_layers(self, settings: SessionSettings, beside: Mapping[str, int]) -> None:
        """Set `layers` for a model that is about to be loaded, and `contexts`."""
        self.contexts, self._fitted = {}, False
        placement = self._options.placement
        if self._options.n_gpu_layers != "auto":
            self.layers = Layers(self._options.n_gpu_layers)
            return
        if placement.split_mode == "tensor":
            self.layers = ALL  # the engine cannot plan that mode (common/fit.cpp)
            return
        devices = [device for device in self._devices() if device["gpu"]]
        if not devices:
            self.layers = Layers(0)
            return
        self._fitted = True
        self.rehearse(settings)  # what the engine is going to plan here
        if not self.causal:
            settings = settings.with_whole_chunks()
        fit = fit_layers(
            self.files.n_blocks,
            functools.cache(lambda layers: self._need(settings, layers)),
            devices,
            beside,
            # if the user placed tensors by hand, experts are not moved automatically
            experts=not placement.overrides and self.trunk_file.integers.get("expert_count", 0) > 1,
            sums=(
                sums_size(*self.files.loaded(settings.mtp)) * (2 if settings.signed_sums else 1)
                if settings.device_sums
                else 0
            ),
        )
        self.layers, self.contexts = fit.layers, fit.contexts

    def _need(self, settings: SessionSettings, layers: Layers) -> MemoryUses | None:
        """What the models and a session on them would take; None if there can be none."""
        try:
            bundled = settings.mtp and self.files.bundled
            trunk = self._load_file(self.trunk_file, bundled, no_alloc=True, layers=layers)
            other = None
            if settings.mtp:
                other = (
                    trunk
                    if bundled
                    else self._load_file(self.head_file, True, no_alloc=True, layers=layers)
                )
            return self.loader.open(trunk, other, settings).memory
        except (EngineError, MemoryError):
            return None

    def _maps(self, file: ModelFile) -> bool:
        """Whether to map a file. The engine ends the process if it maps one whose tensors are not
        aligned."""
        return self._options.use_mmap and file.aligned

    def _load_file(
        self,
        file: ModelFile,
        mtp: bool,
        *,
        no_alloc: bool = False,
        layers: Layers | None = None,
    ) -> NativeModel:
        """Load one file. With `no_alloc` its weights are left out, and it is for the CPU unless
        `layers` says how much of it would go to the devices."""
        planned = layers is not None
        if layers is None:
            layers = Layers(0) if no_alloc else self._chosen_layers()
        options: LoadData = {
            "mtp": mtp,
            "n_gpu_layers": layers.n_gpu_layers,
            "placement": self._placed(layers).as_data() if planned or not no_alloc else None,
            "use_mmap": not no_alloc and self._maps(file),
            "check_tensors": not no_alloc and self._options.check_tensors,
            "no_alloc": no_alloc,
            "changeable": self._options.changeable and not no_alloc,
        }
        self._drop_dead()
        with self._dropping_engine():
            model = self.loader.load(file.path, options)
        if not model.has_decoder:
            raise ModelError(
                f"{file.path}: {file.architecture} has no decoder; only models that decode text "
                "can be collected from"
            )
        if model.has_encoder:
            raise ModelError(
                f"{file.path}: {file.architecture} decodes what its encoder has made of another "
                "text, which a text to collect from does not give; only models that decode text by "
                "themselves can be collected from"
            )
        if not planned and 0 < model.n_ctx_train < self._n_ctx:
            warnings.warn(
                f"n_ctx={self._n_ctx} is more than the {model.n_ctx_train} tokens that "
                f"{file.path.name} was trained on",
                stacklevel=5,
            )
        return model

    def _drop_dead(self) -> None:
        """Let go of what the engine's own process had loaded, if that is gone."""
        if self.loader.died:
            self.free()

    @contextmanager
    def _dropping_engine(self) -> Iterator[None]:
        """If the work inside is interrupted, the engine's own process goes, and with it what it may
        still be busy with. An error says what was loaded if that process died."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, EngineDiedError):
                error.args = (f"{error.args[0]}, while it loaded {self.trunk_file.path}",)
            elif isinstance(error, Exception):
                advise_on_devices(error)
            else:
                self.free()
            raise
