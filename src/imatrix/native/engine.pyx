# cython: language_level=3, binding=True
"""The native core for Python: arguments in, arrays and exceptions out. No policy here."""

import atexit
import logging
import os

import numpy as np

from imatrix.files.names import encoded
from imatrix.native.companions import companions
from imatrix.errors import EngineError, ModelError, NonFiniteError, RowsMissingError

from libc.stdint cimport int8_t, int32_t, int64_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport pair
from libcpp.vector cimport vector

from imatrix.native cimport ext
from imatrix.native.ext cimport (
    CEvaluator, ChunkEvaluation, ChunkScore, Code, CModel, CProduct, CSession, CTrials, CWeights,
    EvaluatorParams, FileWeight, FirstSlot, ModelHeader, ModelParams, NamedRowKernel, NonFinite,
    Parallel, Predictions, ProductParams, RowBlock, SessionParams, Status, Sums, TrialsParams,
)

_log = logging.getLogger("imatrix.engine")

# GGML_LOG_LEVEL_*: none 0, debug 1, info 2, warn 3, error 4
cdef dict _LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}


cdef void _sink(int level, const char * line) noexcept with gil:
    try:
        _log.log(_LEVELS.get(level, logging.INFO), "%s", line.decode("utf-8", "replace"))
    except Exception:
        pass  # a logging handler that fails must not reach into the engine


def set_log_level():
    """Take over the engine's log, from the level that `imatrix.engine` listens to."""
    wanted = _log.getEffectiveLevel()
    level = 1 if wanted <= logging.DEBUG else 2 if wanted <= logging.INFO else 3
    if wanted > logging.WARNING:
        level = 4
    ext.set_log_sink(_sink, level)


def _drop_log():
    # nothing may call into Python once the interpreter goes down
    ext.set_log_sink(NULL, 4)


set_log_level()
atexit.register(_drop_log)


cdef str _text(const string & value):
    return value.decode("utf-8", "replace")


cdef str _name(const string & value):
    # any bytes are a name, and have to come back as they were: see imatrix.files.names
    return value.decode("utf-8", "surrogateescape")


cdef object _check(const Status & status, str prefix=""):
    """Raises the exception that a status stands for; None where it is ok."""
    if status.code == Code.ok:
        return None
    message = prefix + _name(status.message)
    if status.code == Code.out_of_memory:
        raise MemoryError(message)
    if status.code == Code.bad_model:
        raise ModelError(message)
    if status.code == Code.bad_argument:
        raise ValueError(message)
    if status.code == Code.cancelled:
        raise InterruptedError(message)
    if status.code == Code.non_finite:
        raise NonFiniteError(message, weight=_name(status.weight), channel=status.channel,
                             expert=None if status.mat < 0 else status.mat)
    if status.code == Code.rows_missing:
        raise RowsMissingError(message)
    raise EngineError(message)


def model_file(path):
    """The header of a GGUF model file as a dict; raises ModelError where it is not one."""
    cdef ModelHeader found
    cdef string native = os.fsencode(path)
    cdef Status status
    with nogil:
        status = ext.read_model_header(native, found)
    _check(status, path + ": ")
    return {
        "architecture": _name(found.architecture),
        "tokenizer": _text(found.tokenizer),
        "split_count": found.split_count,
        "split_no": found.split_no,
        "split_tensors": found.split_tensors,
        "aligned": bool(found.aligned),
        "data_offset": found.data_offset,
        "tensors": {_name(t.name): tuple(t.ne[d] for d in range(max(1, t.n_dims)))
                    for t in found.tensors},
        "tables": [(_name(t.name), t.offset, t.count) for t in found.tables],
        "integers": {_name(i.first): i.second for i in found.integers},
    }


def engine():
    """(version, build) of the engine this was built with."""
    return _text(ext.engine_version()), _text(ext.engine_build())


def system_info():
    return _text(ext.system_info())


def backends():
    """Registered backends and the devices they see."""
    names = [_text(name) for name in ext.backend_names()]
    devices = [
        {"backend": _text(d.backend), "name": _text(d.name), "description": _text(d.description),
         "buffer_type": _text(d.buffer_type), "gpu": bool(d.gpu), "memory_free": d.memory_free,
         "memory_total": d.memory_all}
        for d in ext.devices()
    ]
    return names, devices


for _companion in companions():
    ext.add_module_folder(encoded(str(_companion.folder)), _companion.problem.encode())


def load_backends():
    """Load the engine's backends; EngineError if there is none for the CPU, with what to do."""
    cdef Status status
    with nogil:
        status = ext.load_backends()
    _check(status)


def backend_modules():
    """(file, problem) of each backend that is a module; the problem is "" if it can be used."""
    return [(_name(m.file), _name(m.problem)) for m in ext.backend_modules()]


def cpu_variant():
    """Which variant of the CPU's backend was loaded ("haswell"), "" if it is linked in."""
    return _text(ext.cpu_variant())


def add_rpc_server(str endpoint):
    """Make the devices of an RPC server known. A server that does not answer ends the process."""
    cdef string native = endpoint.encode("utf-8")
    cdef Status status
    set_log_level()
    with nogil:
        status = ext.add_rpc_server(native)
    _check(status)


def find_name(str pattern, names):
    """The first of `names` that a regular expression finds, as the engine looks for tensors that
    are placed by name (ECMAScript); None for none. ValueError if it is no regular expression."""
    cdef vector[string] native
    cdef int64_t found = -1
    cdef string expression = encoded(pattern)
    names = list(names)
    for name in names:
        native.push_back(encoded(name))
    _check(ext.find_name(expression, native, found))
    return None if found < 0 else names[found]


def row_kernel_names():
    """The row kernels this processor can run, best first."""
    cdef NamedRowKernel[4] kernels
    cdef size_t n = ext.row_kernels(kernels)
    return [kernels[i].name.decode() for i in range(n)]


def chosen_row_kernel():
    """The row kernel that sums are made with: IMATRIX_KERNEL's, else the best. ValueError if this
    processor has none of that name."""
    cdef string refusal = ext.row_kernel_refusal()
    if not refusal.empty():
        raise ValueError(_name(refusal))
    return ext.chosen_row_kernel().name.decode()


def add_squares(str kernel, const float[:, :] rows, float[::1] acc, float[::1] signed_acc=None):
    """acc[j] += sum over i of rows[i, j]², by one named kernel (tests and benchmarks).

    rows: float32 [n_rows, n], rows contiguous and any distance apart; acc: float32 [n].
    signed_acc: float32 [n], to which the values themselves are added; None for the squares only.
    """
    cdef float * beside = NULL
    cdef NamedRowKernel[4] kernels
    cdef size_t n = ext.row_kernels(kernels)
    cdef vector[const float *] pointers
    cdef size_t i
    cdef Py_ssize_t r
    if rows.shape[1] != acc.shape[0]:
        raise ValueError("rows and acc differ in length")
    if signed_acc is not None and signed_acc.shape[0] != acc.shape[0]:
        raise ValueError("acc and signed_acc differ in length")
    if rows.shape[1] > 1 and rows.strides[1] != sizeof(float):
        raise ValueError("a row must be contiguous")
    if acc.shape[0] == 0:
        return
    if signed_acc is not None:
        beside = &signed_acc[0]
    for r in range(rows.shape[0]):
        pointers.push_back(&rows[r, 0])
    for i in range(n):
        if kernels[i].name.decode() == kernel:
            with nogil:
                kernels[i].run(pointers.data(), pointers.size(), <size_t>acc.shape[0], &acc[0],
                               beside)
            return
    raise ValueError(f"no such kernel here: {kernel}")


cdef class RowAdder:
    """Adds squares as a session does, with its threads (tests and benchmarks)."""

    cdef unique_ptr[Parallel] _threads

    def __init__(self, size_t n_threads):
        self._threads.reset(new Parallel())
        self._threads.get().set_threads(n_threads)

    def add(self, list blocks, list sums, list signed_sums=None):
        """sums[b][j] += sum over i of blocks[b][i, j]², for arrays of float32 and of float64, and
        likewise the values themselves to signed_sums, unless that is None.

        Returns None, or (block, channel) of the first that is not finite.
        """
        cdef vector[RowBlock] native
        cdef vector[vector[const float *]] pointers
        cdef NonFinite bad
        cdef const float[:, ::1] rows
        cdef double[::1] acc
        cdef size_t n = sums[0].shape[0]
        cdef Py_ssize_t r
        cdef RowBlock block
        pointers.resize(len(blocks))
        for i in range(len(blocks)):
            rows, acc = blocks[i], sums[i]
            if <size_t>rows.shape[1] != n or <size_t>acc.shape[0] != n or n == 0:
                raise ValueError("rows and sums differ in length")
            for r in range(rows.shape[0]):
                pointers[i].push_back(&rows[r, 0])
            block.rows = pointers[i].data()
            block.n_rows = pointers[i].size()
            block.sums = &acc[0]
            if signed_sums is not None:
                acc = signed_sums[i]
                if <size_t>acc.shape[0] != n:
                    raise ValueError("rows and signed sums differ in length")
                block.signed_sums = &acc[0]
            native.push_back(block)
        with nogil:
            bad = ext.add_rows(self._threads.get()[0], native, n)
        return None if bad.channel < 0 else (bad.block, bad.channel)


def live_objects():
    """How many native objects of each kind exist in this process, for leak tests."""
    return {
        "models": ext.g_live_models,
        "contexts": ext.g_live_contexts,
        "sessions": CSession.live(),
        "sums": Sums.live(),
        "evaluators": CEvaluator.live(),
        "weights": CWeights.live(),
        "trials": CTrials.live(),
    }


# The process that runs the engine. Its threads do not come along when that process forks: what
# waits for them in the child (OpenMP's next parallel region, a destructor that joins) waits for
# ever. So a child neither runs nor frees what it was born with.
_process = None


cdef object _claim_process():
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise RuntimeError(
            f"the engine runs in process {_process}, of which this one is a fork without its "
            "threads: use multiprocessing's 'spawn', or Collector(..., isolate=True), which "
            "starts a process of its own"
        )


cdef extern from *:
    """
    #ifdef _WIN32
    #include <process.h>
    #define imatrix_getpid _getpid
    #else
    #include <unistd.h>
    #define imatrix_getpid getpid
    #endif
    """
    int imatrix_getpid() noexcept nogil


cdef class Product:
    """A matrix of some type, and rows to multiply it with on the CPU (ext/product.h)."""

    cdef unique_ptr[CProduct] _product
    cdef int _made_in

    def __dealloc__(self):
        if self._made_in != imatrix_getpid():
            self._product.release()  # a fork's copy, see _claim_process

    def __init__(self, str type, *, int64_t n_in, int64_t n_out, int64_t n_rows, int64_t n_mat,
                 int n_threads):
        cdef ProductParams params
        cdef Status status
        _claim_process()
        self._made_in = imatrix_getpid()
        set_log_level()
        params.type = type.encode("utf-8")
        params.n_in = n_in
        params.n_out = n_out
        params.n_rows = n_rows
        params.n_mat = n_mat
        params.n_threads = n_threads
        self._product.reset(new CProduct())
        with nogil:
            status = self._product.get().open(params)
        _check(status)

    def run(self):
        """Multiply once; returns the seconds that it took."""
        cdef Status status
        cdef double seconds = 0
        with nogil:
            status = self._product.get().run(seconds)
        _check(status)
        return seconds

    @property
    def buffer_type(self):
        """Where the matrix lies, in the engine's word."""
        return _text(self._product.get().buffer_type())


cdef class Model:
    """A loaded model: its weights and its tokenizer."""

    cdef unique_ptr[CModel] _model
    cdef int _made_in

    def __dealloc__(self):
        if self._made_in != imatrix_getpid():
            self._model.release()  # a fork's copy, see _claim_process

    def __init__(self, str path, *, bint mtp, int n_gpu_layers, bint use_mmap, bint check_tensors,
                 bint no_alloc=False, bint changeable=False, placement=None):
        """`placement`: what Placement.as_data() gives; None for the engine's own choice."""
        cdef ModelParams params
        cdef Status status
        _claim_process()
        self._made_in = imatrix_getpid()
        set_log_level()
        params.path = os.fsencode(path)
        params.mtp = mtp
        params.n_gpu_layers = n_gpu_layers
        params.use_mmap = use_mmap
        params.check_tensors = check_tensors
        params.no_alloc = no_alloc
        params.changeable = changeable
        if placement is not None:
            params.placement.split_mode = placement["split_mode"].encode("utf-8")
            for share in placement["tensor_split"]:
                params.placement.tensor_split.push_back(share)
            params.placement.main_gpu = placement["main_gpu"]
            params.placement.chosen_devices = placement["devices"] is not None
            for name in placement["devices"] or ():
                params.placement.devices.push_back(name.encode("utf-8"))
            for pattern, buffer in placement["overrides"]:
                params.placement.overrides.push_back(
                    pair[string, string](encoded(pattern), encoded(buffer)))
        self._model.reset(new CModel())
        with nogil:
            status = self._model.get().load(params)
        _check(status, path + ": ")

    @property
    def n_nextn(self):
        return self._model.get().n_nextn()

    @property
    def n_trunk(self):
        return self._model.get().n_trunk()

    @property
    def n_vocab(self):
        return self._model.get().n_vocab()

    @property
    def n_ctx_train(self):
        return self._model.get().n_ctx_train()

    @property
    def has_tokenizer(self):
        return bool(self._model.get().has_tokenizer())

    @property
    def has_decoder(self):
        return bool(self._model.get().has_decoder())

    @property
    def has_encoder(self):
        return bool(self._model.get().has_encoder())

    def causal(self):
        """Whether a token sees only those before it; makes a context of one token to ask it."""
        cdef cbool found = True
        cdef Status status
        set_log_level()
        with nogil:
            status = self._model.get().causal(found)
        _check(status)
        return bool(found)

    @property
    def add_bos(self):
        return bool(self._model.get().add_bos())

    @property
    def bos(self):
        return self._model.get().bos()

    @property
    def description(self):
        return _text(self._model.get().description())

    def token_text(self, token):
        """How the vocabulary spells a token; "" for a token that there is not."""
        if not 0 <= token < 2**31:
            return ""
        return _text(self._model.get().token_text(token))

    def metadata(self, str prefix):
        """Keys of the file that begin with `prefix` and their values as text, arrays left out."""
        return {_text(each.first): _text(each.second)
                for each in self._model.get().metadata(prefix.encode("utf-8"))}

    def tokenize(self, str text, *, bint add_special, bint parse_special):
        """Token ids of a text, int32 [n_tokens]."""
        cdef string native = text.encode("utf-8")
        cdef vector[int32_t] tokens
        cdef Status status
        with nogil:
            status = self._model.get().tokenize(native, add_special, parse_special, tokens)
        _check(status)
        out = np.empty(tokens.size(), dtype=np.int32)
        cdef int32_t[::1] view = out
        if tokens.size():
            memcpy(&view[0], tokens.data(), tokens.size() * sizeof(int32_t))
        return out


cdef object _counts_of(const ext.Slot * slot):
    out = np.empty(slot.total_counts.size(), dtype=np.int64)
    cdef int64_t[::1] view = out
    memcpy(&view[0], slot.total_counts.data(), slot.total_counts.size() * sizeof(int64_t))
    return out


cdef object _sums_of(const ext.Slot * slot):
    out = np.empty((slot.shape.n_mat, slot.shape.n_in), dtype=np.float64)
    cdef double[:, ::1] view = out
    memcpy(&view[0, 0], slot.total.data(), slot.total.size() * sizeof(double))
    return out


cdef object _signed_of(const ext.Slot * slot):
    """None where they are not kept."""
    if slot.signed_total.empty():
        return None
    out = np.empty((slot.shape.n_mat, slot.shape.n_in), dtype=np.float64)
    cdef double[:, ::1] view = out
    memcpy(&view[0, 0], slot.signed_total.data(), slot.signed_total.size() * sizeof(double))
    return out


_FIRST_SLOTS = {"cached": 0, "counted": 1, "absent": 2}  # enum FirstSlot


cdef class Session:
    """Trunk and head contexts of a model, and the sums that they collect."""

    cdef unique_ptr[CSession] _session
    cdef int _made_in
    # the session refers to both: keep them alive
    cdef readonly Model model
    cdef readonly Model head

    def __init__(self, Model model not None, Model head=None):
        """`head`: the model that holds the MTP head; None where no head will be asked for."""
        self._made_in = imatrix_getpid()
        self.model = model
        self.head = head
        cdef const CModel * with_head = NULL
        if head is not None:
            with_head = head._model.get()
        self._session.reset(new CSession(model._model.get()[0], with_head))

    def __dealloc__(self):
        if self._made_in != imatrix_getpid():
            self._session.release()  # a fork's copy, see _claim_process

    def open(self, *, int n_ctx, int n_batch, int n_ubatch, int n_seq, int n_threads, bint mtp,
             bint process_output, bint perplexity, bint signed_sums=True, bint device_sums=True,
             bint leave_out_logits=True, str first_slot="cached", bint computes=True):
        """Make the contexts; the sums of an earlier open() stay, the signed ones where both want
        them.

        first_slot: "cached"; "counted" and "absent" are for comparisons (FirstSlot in session.h).
        computes: False for try_decode() only.
        """
        cdef SessionParams params
        cdef Status status
        set_log_level()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch
        params.n_seq = n_seq
        params.n_threads = n_threads
        params.mtp = mtp
        params.process_output = process_output
        params.perplexity = perplexity
        params.signed_sums = signed_sums
        params.device_sums = device_sums
        params.leave_out_logits = leave_out_logits
        params.first_slot = <FirstSlot><int32_t>_FIRST_SLOTS[first_slot]
        params.computes = computes
        with nogil:
            status = self._session.get().open(params)
        _check(status)

    def try_decode(self):
        """Decode a chunk and a few rows of the head, up to where the engine would compute. Only of
        models loaded with no_alloc, after open(computes=False), and once."""
        cdef Status status
        with nogil:
            status = self._session.get().try_decode()
        _check(status)

    def step(self, const int32_t[::1] tokens not None, const int32_t[::1] lengths not None):
        """Collect the chunks of `lengths` tokens each, all or none of them.

        Returns a list of (nll, nll_sq, n_scored), one a chunk, in nats.
        """
        cdef Status status
        cdef vector[ChunkScore] scores
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t i
        for i in range(lengths.shape[0]):
            total += lengths[i]
        if lengths.shape[0] == 0 or total != tokens.shape[0] or total == 0:
            raise ValueError("lengths do not add up to the number of tokens")
        scores.resize(lengths.shape[0])
        with nogil:
            status = self._session.get().step(&tokens[0], &lengths[0],
                                              <int32_t>lengths.shape[0], scores.data())
        _check(status)
        return [(s.nll, s.nll_sq, s.n_scored) for s in scores]

    def clear_sums(self):
        """Set the sums and counts to zero; between two steps."""
        self._session.get().clear_sums()

    def cancel(self):
        """From any thread: end the running step early (it raises InterruptedError)."""
        self._session.get().cancel()

    def clear_cancel(self):
        self._session.get().clear_cancel()

    def set_hook_enabled(self, bint enabled):
        """Off: run the same graphs without looking at them (benchmarks)."""
        self._session.get().set_hook_enabled(enabled)

    def snapshot(self):
        """name -> (sums float64 [n_mat, n_in], counts int64 [n_counts], signed sums as sums, or
        None), copies."""
        out = {}
        cdef const ext.Slot * slot
        cdef size_t w
        for w in range(self._session.get().sums().weights().size()):
            if self._session.get().sums().weights()[w].slot == <size_t>-1:
                continue
            slot = &self._session.get().sums().slots()[self._session.get().sums().weights()[w].slot]
            counts = _counts_of(slot)
            if not counts.any():
                continue  # seen only in chunks that did not count
            sums = _sums_of(slot)
            out[_name(self._session.get().sums().weights()[w].name)] = (
                sums, counts, _signed_of(slot))
        return out

    def counts(self):
        """name -> counts int64 [n_counts], copies, of every weight that has been seen."""
        out = {}
        cdef const ext.Slot * slot
        cdef size_t w
        for w in range(self._session.get().sums().weights().size()):
            if self._session.get().sums().weights()[w].slot == <size_t>-1:
                continue
            slot = &self._session.get().sums().slots()[self._session.get().sums().weights()[w].slot]
            out[_name(self._session.get().sums().weights()[w].name)] = _counts_of(slot)
        return out

    def groups(self):
        """[(names, sums float64 [n_mat, n_in], counts int64 [n_counts], signed sums as sums, or
        None)], copies: what weights fed by one activation share is there once. Weights without
        rows are left out."""
        cdef const ext.Slot * slot
        names = {}
        for w in range(self._session.get().sums().weights().size()):
            index = self._session.get().sums().weights()[w].slot
            if index != <size_t>-1:
                names.setdefault(index, []).append(
                    _name(self._session.get().sums().weights()[w].name))
        out = []
        for index, shared in names.items():
            slot = &self._session.get().sums().slots()[<size_t>index]
            counts = _counts_of(slot)
            if not counts.any():
                continue
            sums = _sums_of(slot)
            out.append((shared, sums, counts, _signed_of(slot)))
        return out

    def restore(self, names, const double[:, ::1] sums not None,
                const int64_t[::1] counts not None, const double[:, ::1] signed_sums=None):
        """Put back one element of groups(), bit for bit; before the first step."""
        cdef const double * native_signed = NULL
        cdef ext.Shape shape
        cdef Status status
        cdef vector[string] native
        if sums.shape[0] == 0 or sums.shape[1] == 0 or counts.shape[0] not in (1, sums.shape[0]):
            raise ValueError("sums and counts do not fit together")
        if signed_sums is not None:
            if (signed_sums.shape[0] != sums.shape[0] or signed_sums.shape[1] != sums.shape[1]):
                raise ValueError("sums and signed sums do not fit together")
            native_signed = &signed_sums[0, 0]
        shape.n_mat = sums.shape[0]
        shape.n_in = sums.shape[1]
        shape.n_counts = counts.shape[0]
        for name in names:
            native.push_back(encoded(name))
        with nogil:
            status = self._session.get().restore(native, shape, &sums[0, 0], &counts[0],
                                                 native_signed)
        _check(status)

    @property
    def counters(self):
        """Stops, bytes fetched from devices, elements squared, graphs left early, since the start."""
        c = self._session.get().counters()
        return {"stops": c.stops, "fetched_bytes": c.fetched_bytes,
                "squared_elements": c.squared_elements, "ended": c.ended}

    @property
    def plan(self):
        """What the graphs multiply: context -> (needs outputs, weight -> rows a token)."""
        trunk = self._session.get().trunk_plan()
        head = self._session.get().head_plan()
        return {
            "trunk": (bool(trunk.needs_outputs), {_name(w.name): w.rows for w in trunk.weights}),
            "head": (bool(head.needs_outputs), {_name(w.name): w.rows for w in head.weights}),
        }

    @property
    def memory(self):
        """Bytes taken, a dict for each kind of memory (see ext/memory_use.h)."""
        return [
            {"device": _text(use.device), "host": bool(use.host), "plain": bool(use.plain),
             "model": use.model, "context": use.context, "compute": use.compute}
            for use in self._session.get().memory()
        ]

    @property
    def kernel(self):
        return self._session.get().kernel().decode()


cdef object _doubles(const vector[double] & values):
    out = np.empty(values.size(), dtype=np.float64)
    cdef double[::1] view = out
    if values.size():
        memcpy(&view[0], values.data(), values.size() * sizeof(double))
    return out


cdef object _ints(const vector[int32_t] & values):
    out = np.empty(values.size(), dtype=np.int32)
    cdef int32_t[::1] view = out
    if values.size():
        memcpy(&view[0], values.data(), values.size() * sizeof(int32_t))
    return out


cdef object _small_ints(const vector[int8_t] & values):
    out = np.empty(values.size(), dtype=np.int8)
    cdef int8_t[::1] view = out
    if values.size():
        memcpy(&view[0], values.data(), values.size())
    return out


cdef dict _predictions(const Predictions & found):
    return {
        "nll": _doubles(found.nll),
        "top": _ints(found.top),
        "reference_nll": _doubles(found.reference_nll),
        "reference_top": _ints(found.reference_top),
        "kl": _doubles(found.kl),
    }


cdef dict _evaluation(const ChunkEvaluation & found):
    return {
        "trunk": _predictions(found.trunk),
        "head": _predictions(found.head),
        "known": _small_ints(found.known),
        "accepted": _small_ints(found.accepted),
    }


cdef class Evaluator:
    """A model, and maybe a reference beside it, that score chunks of text."""

    cdef unique_ptr[CEvaluator] _evaluator
    cdef int _made_in
    # the evaluator refers to all of them: keep them alive
    cdef readonly Model model
    cdef readonly Model head
    cdef readonly Model reference
    cdef readonly Model reference_head

    def __init__(self, Model model not None, Model head=None, Model reference=None,
                 Model reference_head=None):
        """`head`, `reference_head`: the models that hold the heads; None where none is scored."""
        self._made_in = imatrix_getpid()
        self.model = model
        self.head = head
        self.reference = reference
        self.reference_head = reference_head
        cdef const CModel * with_head = NULL
        cdef const CModel * beside = NULL
        cdef const CModel * beside_head = NULL
        if head is not None:
            with_head = head._model.get()
        if reference is not None:
            beside = reference._model.get()
        if reference_head is not None:
            beside_head = reference_head._model.get()
        self._evaluator.reset(
            new CEvaluator(model._model.get()[0], with_head, beside, beside_head))

    def __dealloc__(self):
        if self._made_in != imatrix_getpid():
            self._evaluator.release()  # a fork's copy, see _claim_process

    def open(self, *, int n_ctx, int n_batch, int n_ubatch, int n_threads, int depth):
        """Make the contexts; the head's too where a head was given."""
        cdef EvaluatorParams params
        cdef Status status
        if self.reference is not None and (self.head is None) != (self.reference_head is None):
            raise ValueError("a head for the model and for the reference, or for neither")
        set_log_level()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch
        params.n_threads = n_threads
        params.depth = depth
        params.mtp = self.head is not None
        with nogil:
            status = self._evaluator.get().open(params)
        _check(status)

    def step(self, const int32_t[::1] tokens not None):
        """Score one chunk: a dict of arrays, an entry a scored position."""
        cdef Status status
        cdef ChunkEvaluation found
        cdef int32_t n_tokens = <int32_t>tokens.shape[0]
        if n_tokens == 0:
            raise ValueError("no tokens")
        with nogil:
            status = self._evaluator.get().step(&tokens[0], n_tokens, found)
        _check(status)
        return _evaluation(found)

    def keep(self, const int32_t[::1] tokens not None):
        """Run the trunk over a chunk, and keep what it gives for step_kept(), which gets the number
        that this returns."""
        cdef Status status
        cdef int32_t n_tokens = <int32_t>tokens.shape[0]
        if n_tokens == 0:
            raise ValueError("no tokens")
        with nogil:
            status = self._evaluator.get().keep(&tokens[0], n_tokens)
        _check(status)
        return self._evaluator.get().n_kept() - 1

    def step_kept(self, int chunk):
        """As step() of a kept chunk, if the trunk's weights are as they were."""
        cdef Status status
        cdef ChunkEvaluation found
        with nogil:
            status = self._evaluator.get().step_kept(chunk, found)
        _check(status)
        return _evaluation(found)

    def cancel(self):
        """From any thread: end the running step early (it raises InterruptedError)."""
        self._evaluator.get().cancel()

    def clear_cancel(self):
        self._evaluator.get().clear_cancel()


cdef class Weights:
    """The weights of loaded models, changed in place (ext/weights.h)."""

    cdef unique_ptr[CWeights] _weights
    cdef int _made_in
    # it refers to both: keep them alive
    cdef readonly Model model
    cdef readonly Model head

    def __init__(self, Model model not None, Model head=None):
        """Both loaded with changeable=True; `head`: the model that holds the head."""
        cdef const CModel * with_head = NULL
        self._made_in = imatrix_getpid()
        self.model = model
        self.head = head
        if head is not None:
            with_head = head._model.get()
        self._weights.reset(new CWeights(model._model.get()[0], with_head))

    def __dealloc__(self):
        if self._made_in != imatrix_getpid():
            self._weights.release()  # a fork's copy, see _claim_process

    def set_threads(self, int n):
        """How many threads quantize."""
        self._weights.get().set_threads(n)

    def names(self):
        """Every tensor that was loaded, in the models' order."""
        return [_name(name) for name in self._weights.get().names()]

    def quantize(self, str name, int type, const unsigned char[::1] source not None,
                 const float[::1] importance):
        """Put in place what the type makes of a weight; returns the weighted squared error.

        `source`: the bytes of the weight's file. `importance`: [matrices * values a row], or None.
        """
        cdef Status status
        cdef double error = 0
        cdef FileWeight weight = _file_weight(name, source, importance)
        with nogil:
            status = self._weights.get().quantize(weight, type, error)
        _check(status)
        return error

    def error(self, str name, int type, const unsigned char[::1] source not None,
              const float[::1] importance, *, int64_t every):
        """The error that quantize() would give, from every so many-th row; changes nothing."""
        cdef Status status
        cdef double error = 0
        cdef FileWeight weight = _file_weight(name, source, importance)
        with nogil:
            status = self._weights.get().error_of(weight, type, every, error)
        _check(status)
        return error

    def put(self, str name, const unsigned char[::1] source not None):
        """Put the file's own bytes in place."""
        cdef Status status
        cdef FileWeight weight = _file_weight(name, source, None)
        with nogil:
            status = self._weights.get().put(weight)
        _check(status)

    def holds(self, str name, const unsigned char[::1] source not None):
        """Whether the bytes in place are these, to the bit."""
        cdef Status status
        cdef cbool same = False
        cdef FileWeight weight = _file_weight(name, source, None)
        with nogil:
            status = self._weights.get().holds(weight, same)
        _check(status)
        return bool(same)


cdef FileWeight _file_weight(str name, const unsigned char[::1] source,
                             const float[::1] importance):
    cdef FileWeight weight
    weight.name = encoded(name)
    weight.data = &source[0] if source.shape[0] else NULL
    weight.size = source.shape[0]
    weight.importance = NULL
    weight.n_importance = 0
    if importance is not None and importance.shape[0]:
        weight.importance = &importance[0]
        weight.n_importance = importance.shape[0]
    return weight


cdef class Trials:
    """A trunk with changed weights, against what it gave at first (ext/trials.h)."""

    cdef unique_ptr[CTrials] _trials
    cdef int _made_in
    cdef readonly Model model

    def __init__(self, Model model not None):
        self._made_in = imatrix_getpid()
        self.model = model
        self._trials.reset(new CTrials(model._model.get()[0]))

    def __dealloc__(self):
        if self._made_in != imatrix_getpid():
            self._trials.release()  # a fork's copy, see _claim_process

    def open(self, *, int n_ctx, int n_threads, int top=0):
        """Make the context. `top`: logits that are kept of a row, the likeliest; 0 for all."""
        cdef TrialsParams params
        cdef Status status
        set_log_level()
        params.n_ctx = n_ctx
        params.n_threads = n_threads
        params.top = top
        with nogil:
            status = self._trials.get().open(params)
        _check(status)

    def keep(self, const int32_t[::1] tokens not None):
        """Run a chunk as the weights are now, and keep what it gives."""
        cdef Status status
        cdef Predictions found
        cdef int32_t n_tokens = <int32_t>tokens.shape[0]
        if n_tokens == 0:
            raise ValueError("no tokens")
        with nogil:
            status = self._trials.get().keep(&tokens[0], n_tokens, found)
        _check(status)
        return {"nll": _doubles(found.nll), "top": _ints(found.top)}

    def start(self, int block):
        """Let later runs begin at a block; returns the one at which they do.

        All weights of the blocks before must be as they were when the chunks were kept, now and
        from then on.
        """
        cdef Status status
        cdef int32_t begins_at = 0
        with nogil:
            status = self._trials.get().start(block, begins_at)
        _check(status)
        return begins_at

    def run(self, int chunk):
        """Run a kept chunk as the weights are now: arrays, an entry a scored position."""
        cdef Status status
        cdef Predictions found
        with nogil:
            status = self._trials.get().run(chunk, found)
        _check(status)
        return {"nll": _doubles(found.nll), "top": _ints(found.top), "kl": _doubles(found.kl)}

    @property
    def count(self):
        """Chunks that were kept."""
        return self._trials.get().count()

    @property
    def kept_bytes(self):
        """Bytes that keeping them has taken."""
        return self._trials.get().kept_bytes()

    def cancel(self):
        """From any thread: end the running call early (it raises InterruptedError)."""
        self._trials.get().cancel()

    def clear_cancel(self):
        self._trials.get().clear_cancel()
