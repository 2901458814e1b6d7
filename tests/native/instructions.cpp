// What benchmarks/instructions.py counts the instructions of: a row kernel, or the hook over a
// whole chunk. Graphs are only walked, as the scheduler would, and no backend takes part: the
// engine's CPU backend is compiled for this processor, which valgrind may not know.
//
//     imatrix-instructions CASE      kernel:NAME, hook:dense or hook:experts
//
// It prints how many elements were squared.
#include "eval_hook.h"
#include "row_kernels.h"
#include "sums.h"

#include "ggml.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace imatrix;

namespace {

constexpr int64_t kTokens = 512;
constexpr int64_t kLayers = 24;
constexpr int64_t kEmbd   = 1024;
constexpr int64_t kHeads  = 2048; // heads * their size
constexpr int64_t kFf     = 3072;
constexpr int64_t kExpert = 64;
constexpr int64_t kUsed   = 6;
constexpr int64_t kFfExp  = 256;
constexpr int     kOthers = 60; // nodes of a layer that are no multiplication of a weight

struct FreeContext {
    void operator()(ggml_context * ctx) const { ggml_free(ctx); }
};

struct Chunk {
    std::unique_ptr<ggml_context, FreeContext> context;
    std::vector<float>                         rows; // of every activation
    std::vector<int32_t>                       ids;
    std::vector<ggml_tensor *>                 nodes;

    explicit Chunk(bool experts) {
        context.reset(ggml_init({size_t{64} << 20, nullptr, /*.no_alloc =*/true}));
        rows.resize(static_cast<size_t>(kTokens * kFf));
        for (size_t i = 0; i < rows.size(); ++i) {
            rows[i] = static_cast<float>(i % 251) / 251.0f - 0.5f;
        }
        for (int64_t token = 0; token < kTokens; ++token) {
            for (int64_t used = 0; used < kUsed; ++used) {
                ids.push_back(static_cast<int32_t>((token * 7 + used * 11) % kExpert));
            }
        }
        for (int64_t layer = 0; layer < kLayers; ++layer) {
            const std::string block = "blk." + std::to_string(layer) + ".";
            ggml_tensor *     x     = activation({kEmbd, kTokens});
            for (int i = 0; i < kOthers; ++i) {
                nodes.push_back(ggml_add(context.get(), x, x));
            }
            dense(block + "attn_q.weight", x);
            dense(block + "attn_k.weight", x);
            dense(block + "attn_v.weight", x);
            dense(block + "attn_output.weight", activation({kHeads, kTokens}));
            if (!experts) {
                x = activation({kEmbd, kTokens});
                dense(block + "ffn_gate.weight", x);
                dense(block + "ffn_up.weight", x);
                dense(block + "ffn_down.weight", activation({kFf, kTokens}));
                continue;
            }
            ggml_tensor * chosen = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, kUsed, kTokens);
            chosen->data         = ids.data();
            x                    = activation({kEmbd, 1, kTokens});
            routed(block + "ffn_gate_exps.weight", x, chosen);
            routed(block + "ffn_up_exps.weight", x, chosen);
            routed(block + "ffn_down_exps.weight", activation({kFfExp, kUsed, kTokens}), chosen);
        }
    }

    ggml_tensor * activation(const std::vector<int64_t> & ne) {
        ggml_tensor * made =
            ggml_new_tensor(context.get(), GGML_TYPE_F32, static_cast<int>(ne.size()), ne.data());
        made->data = rows.data();
        return made;
    }

    void dense(const std::string & name, ggml_tensor * x) {
        ggml_tensor * weight = ggml_new_tensor_2d(context.get(), GGML_TYPE_F16, x->ne[0], 16);
        ggml_set_name(weight, name.c_str());
        nodes.push_back(ggml_mul_mat(context.get(), weight, x));
    }

    void routed(const std::string & name, ggml_tensor * x, ggml_tensor * chosen) {
        ggml_tensor * weight =
            ggml_new_tensor_3d(context.get(), GGML_TYPE_F16, x->ne[0], 16, kExpert);
        ggml_set_name(weight, name.c_str());
        nodes.push_back(ggml_mul_mat_id(context.get(), weight, x, chosen));
    }
};

struct Case {
    // a kernel ...
    RowKernel                  kernel = nullptr;
    std::vector<float>         block;
    std::vector<const float *> rows;
    std::vector<float>         acc;
    std::vector<float>         signed_acc;
    // ... or a chunk
    std::unique_ptr<Chunk> chunk;
    Sums                   sums;
    EvalHook               hook{sums};
};

} // namespace

// Only what runs inside is counted (valgrind's --toggle-collect).
extern "C" __attribute__((noinline)) void imatrix_measured(Case & measured);
extern "C" __attribute__((noinline)) void imatrix_measured(Case & measured) {
    if (measured.kernel != nullptr) {
        measured.kernel(measured.rows.data(), measured.rows.size(), measured.acc.size(),
                        measured.acc.data(), measured.signed_acc.data());
        return;
    }
    measured.hook.begin_chunk();
    measured.hook.begin_decode({});
    for (ggml_tensor * node : measured.chunk->nodes) {
        if (EvalHook::callback(node, true, &measured.hook)) {
            EvalHook::callback(node, false, &measured.hook);
        }
    }
    measured.hook.finish_chunk();
    measured.sums.commit();
}

int main(int argc, char ** argv) {
    const std::string what = argc == 2 ? argv[1] : "";
    Case              measured;
    long long         elements = 0;
    if (what.compare(0, 7, "kernel:") == 0) {
        NamedRowKernel all[4];
        const size_t   n = row_kernels(all);
        for (size_t i = 0; i < n; ++i) {
            if (what.substr(7) == all[i].name) {
                measured.kernel = all[i].run;
            }
        }
        if (measured.kernel == nullptr) {
            std::fprintf(stderr, "this processor does not run %s\n", what.c_str());
            return 3;
        }
        measured.block.resize(static_cast<size_t>(kTokens * kHeads), 0.5f);
        measured.acc.resize(static_cast<size_t>(kHeads));
        measured.signed_acc.resize(static_cast<size_t>(kHeads));
        for (int64_t r = 0; r < kTokens; ++r) {
            measured.rows.push_back(measured.block.data() + r * kHeads);
        }
        elements = kTokens * kHeads;
    } else if (what == "hook:dense" || what == "hook:experts") {
        measured.chunk = std::make_unique<Chunk>(what == "hook:experts");
        std::printf("kernel %s\n", chosen_row_kernel().name);
    } else {
        std::fprintf(stderr, "usage: %s kernel:NAME|hook:dense|hook:experts\n", argv[0]);
        return 2;
    }
    imatrix_measured(measured); // slots are made, memory is touched
    const long long before = measured.hook.counters().squared_elements;
    imatrix_measured(measured);
    if (measured.chunk != nullptr) {
        elements = measured.hook.counters().squared_elements - before;
    }
    if (measured.hook.error().kind != Failure::none) {
        std::fprintf(stderr, "the hook failed\n");
        return 1;
    }
    std::printf("elements %lld\n", elements);
    return 0;
}
