# What ext/ offers, declared for Cython. Nothing but declarations.
from libc.stdint cimport int8_t, int32_t, int64_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.utility cimport pair
from libcpp.vector cimport vector


cdef extern from "status.h" namespace "imatrix" nogil:
    cdef enum class Code(int):
        ok
        bad_argument
        bad_model
        out_of_memory
        engine_failed
        non_finite
        rows_missing
        cancelled

    cdef cppclass Status:
        Code code
        string message
        string weight
        int64_t mat
        int64_t channel


cdef extern from "live.h" namespace "imatrix" nogil:
    # each an std::atomic, which is read as a number
    int64_t g_live_contexts
    int64_t g_live_models


cdef extern from "engine_log.h" namespace "imatrix" nogil:
    ctypedef void (*LogSink)(int level, const char * line) noexcept
    void set_log_sink(LogSink sink, int level)


cdef extern from "backend_modules.h" namespace "imatrix" nogil:
    cdef cppclass BackendModule:
        string file
        string problem
    void add_module_folder(const string & folder, const string & problem)
    Status load_backends()
    vector[BackendModule] backend_modules()
    string cpu_variant()


cdef extern from "engine_info.h" namespace "imatrix" nogil:
    cdef cppclass Device:
        string backend
        string name
        string description
        string buffer_type
        cbool gpu
        uint64_t memory_free
        uint64_t memory_all
    vector[string] backend_names()
    vector[Device] devices()
    Status add_rpc_server(const string & endpoint)
    string engine_version()
    string engine_build()
    string system_info()


cdef extern from "product.h" namespace "imatrix" nogil:
    cdef cppclass ProductParams:
        string type
        int64_t n_in
        int64_t n_out
        int64_t n_rows
        int64_t n_mat
        int32_t n_threads

    cdef cppclass CProduct "imatrix::Product":
        CProduct()
        Status open(const ProductParams & params)
        Status run(double & seconds)
        string buffer_type() const


cdef extern from "model_header.h" namespace "imatrix" nogil:
    cdef cppclass FileTensor:
        string name
        int n_dims
        int64_t[4] ne

    cdef cppclass FileTable:
        string name
        int64_t offset
        int64_t count

    cdef cppclass ModelHeader:
        string architecture
        string tokenizer
        int64_t split_count
        int64_t split_no
        int64_t split_tensors
        int64_t data_offset
        bint aligned
        vector[FileTensor] tensors
        vector[FileTable] tables
        vector[pair[string, int64_t]] integers

    Status read_model_header(const string & path, ModelHeader & out)


cdef extern from "row_kernels.h" namespace "imatrix" nogil:
    ctypedef void (*RowKernel)(const float * const * rows, size_t n_rows, size_t n, float * acc,
                               float * signed_acc) noexcept

    cdef cppclass NamedRowKernel:
        const char * name
        RowKernel run

    size_t row_kernels(NamedRowKernel * out)
    const NamedRowKernel & chosen_row_kernel()
    string row_kernel_refusal()


cdef extern from "parallel.h" namespace "imatrix" nogil:
    cdef cppclass Parallel:
        void set_threads(size_t n)


cdef extern from "add_rows.h" namespace "imatrix" nogil:
    cdef cppclass RowBlock:
        const float * const * rows
        size_t n_rows
        double * sums
        double * signed_sums

    cdef cppclass NonFinite:
        size_t block
        int64_t channel

    NonFinite add_rows(Parallel & threads, const vector[RowBlock] & blocks, size_t n)


cdef extern from "sums.h" namespace "imatrix" nogil:
    cdef cppclass Shape:
        int64_t n_in
        int64_t n_mat
        int64_t n_counts

    cdef cppclass Slot "imatrix::Sums::Slot":
        Shape shape
        vector[double] total
        vector[double] signed_total
        vector[int64_t] total_counts

    cdef cppclass Weight "imatrix::Sums::Weight":
        string name
        size_t slot

    cdef cppclass Sums:
        const vector[Weight] & weights() const
        const vector[Slot] & slots() const
        @staticmethod
        int64_t live()


cdef extern from "eval_hook.h" namespace "imatrix" nogil:
    cdef cppclass HookCounters:
        int64_t stops
        int64_t fetched_bytes
        int64_t squared_elements
        int64_t ended


cdef extern from "wanted_nodes.h" namespace "imatrix" nogil:
    cdef cppclass PlannedWeight:
        string name
        int64_t rows


cdef extern from "placement.h" namespace "imatrix" nogil:
    cdef cppclass Placement:
        string split_mode
        vector[float] tensor_split
        int32_t main_gpu
        cbool chosen_devices
        vector[string] devices
        vector[pair[string, string]] overrides

    Status find_name(const string & pattern, const vector[string] & names, int64_t & found)


cdef extern from "model.h" namespace "imatrix" nogil:
    cdef cppclass ModelParams:
        string path
        cbool mtp
        int32_t n_gpu_layers
        cbool use_mmap
        cbool check_tensors
        cbool no_alloc
        cbool changeable
        Placement placement

    cdef cppclass CModel "imatrix::Model":
        Status load(const ModelParams & params)
        int32_t n_nextn() const
        int32_t n_trunk() const
        int32_t n_vocab() const
        int32_t n_ctx_train() const
        cbool has_tokenizer() const
        cbool has_decoder() const
        cbool has_encoder() const
        Status causal(cbool & out) const
        cbool add_bos() const
        int32_t bos() const
        string description() const
        string token_text(int32_t token) const
        vector[pair[string, string]] metadata(const string & prefix) const
        Status tokenize(const string & text, cbool add_special, cbool parse_special,
                        vector[int32_t] & out) const


cdef extern from "scores.h" namespace "imatrix" nogil:
    cdef cppclass ChunkScore:
        double nll
        double nll_sq
        int64_t n_scored


cdef extern from "graph_plan.h" namespace "imatrix" nogil:
    cdef cppclass GraphPlan:
        vector[PlannedWeight] weights
        cbool needs_outputs


cdef extern from "memory_use.h" namespace "imatrix" nogil:
    cdef cppclass MemoryUse:
        string device
        cbool host
        cbool plain
        int64_t model
        int64_t context
        int64_t compute


cdef extern from "session.h" namespace "imatrix" nogil:
    cdef enum class FirstSlot(int32_t):
        cached
        counted
        absent

    cdef cppclass SessionParams:
        int32_t n_ctx
        int32_t n_batch
        int32_t n_ubatch
        int32_t n_seq
        int32_t n_threads
        cbool mtp
        cbool process_output
        cbool perplexity
        cbool signed_sums
        cbool device_sums
        cbool leave_out_logits
        FirstSlot first_slot
        cbool computes

    cdef cppclass CSession "imatrix::Session":
        CSession(const CModel & trunk, const CModel * head)
        Status open(const SessionParams & params)
        Status try_decode()
        Status step(const int32_t * tokens, const int32_t * lengths, int32_t n_chunks,
                    ChunkScore * scores)
        Status restore(const vector[string] & names, const Shape & shape, const double * sums,
                       const int64_t * counts, const double * signed_sums)
        void clear_sums()
        void cancel()
        void clear_cancel()
        void set_hook_enabled(cbool enabled)
        const Sums & sums() const
        const HookCounters & counters() const
        const GraphPlan & trunk_plan() const
        const GraphPlan & head_plan() const
        const char * kernel() const
        vector[MemoryUse] memory() const
        @staticmethod
        int64_t live()


cdef extern from "evaluator.h" namespace "imatrix" nogil:
    cdef cppclass EvaluatorParams:
        int32_t n_ctx
        int32_t n_batch
        int32_t n_ubatch
        int32_t n_threads
        int32_t depth
        cbool mtp

    cdef cppclass Predictions:
        vector[double] nll
        vector[int32_t] top
        vector[double] reference_nll
        vector[int32_t] reference_top
        vector[double] kl

    cdef cppclass ChunkEvaluation:
        Predictions trunk
        Predictions head
        vector[int8_t] known
        vector[int8_t] accepted

    cdef cppclass CEvaluator "imatrix::Evaluator":
        CEvaluator(const CModel & model, const CModel * head, const CModel * reference,
                   const CModel * reference_head)
        Status open(const EvaluatorParams & params)
        Status step(const int32_t * tokens, int32_t n_tokens, ChunkEvaluation & out)
        Status keep(const int32_t * tokens, int32_t n_tokens)
        int32_t n_kept() const
        Status step_kept(int32_t chunk, ChunkEvaluation & out)
        void cancel()
        void clear_cancel()
        @staticmethod
        int64_t live()


cdef extern from "weights.h" namespace "imatrix" nogil:
    cdef cppclass FileWeight:
        string name
        const void * data
        size_t size
        const float * importance
        size_t n_importance

    cdef cppclass CWeights "imatrix::Weights":
        CWeights(const CModel & model, const CModel * head)
        void set_threads(size_t n)
        vector[string] names() const
        Status quantize(const FileWeight & weight, int type, double & error)
        Status error_of(const FileWeight & weight, int type, int64_t every, double & error)
        Status put(const FileWeight & weight)
        Status holds(const FileWeight & weight, cbool & same)
        @staticmethod
        int64_t live()


cdef extern from "trials.h" namespace "imatrix" nogil:
    cdef cppclass TrialsParams:
        int32_t n_ctx
        int32_t n_threads
        int32_t top

    cdef cppclass CTrials "imatrix::Trials":
        CTrials(const CModel & model)
        Status open(const TrialsParams & params)
        Status keep(const int32_t * tokens, int32_t n_tokens, Predictions & out)
        Status start(int32_t block, int32_t & begins_at)
        Status run(int32_t chunk, Predictions & out)
        int32_t count() const
        int64_t kept_bytes() const
        void cancel()
        void clear_cancel()
        @staticmethod
        int64_t live()
