// The native core against a naive reference in double, for runs under sanitizers. The broad
// search for cases is in tests/native/test_hook.py; here are fixed and pseudo-random ones without
// Python.
//
// imatrix-core-tests [MODEL.gguf]   with a model: a whole session too, trunk and head
#include "checks.h"
#include "contexts.h"
#include "engine_log.h"
#include "evaluator.h"
#include "far_device.h"
#include "harness.h"
#include "model.h"
#include "model_header.h"
#include "session.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace imatrix;
using namespace imatrix::testing;

namespace {

// A strided view of a random array, by the rules of ggml's CPU backend: contiguous rows.
struct Activation {
    std::vector<float> data;
    Rows               rows;

    Activation(int64_t n_in, int64_t n1, int64_t n2, int64_t n3) {
        rows.ne         = {n_in, n1, n2, n3};
        rows.stride     = {1, n_in + any(0, 3), 0, 0};
        const bool swap = any(0, 1) == 1; // dimensions 1 and 2 permuted
        if (swap) {
            rows.stride[2] = rows.stride[1];
            rows.stride[1] = rows.stride[2] * n2;
            rows.stride[3] = rows.stride[1] * n1 + any(0, 5);
        } else {
            rows.stride[2] = rows.stride[1] * n1 + any(0, 5);
            rows.stride[3] = rows.stride[2] * n2 + any(0, 5);
        }
        rows.offset = any(0, 7);
        data        = normal(static_cast<size_t>(rows.offset + rows.stride[3] * n3));
        rows.data   = data.data();
        rows.size   = data.size();
    }

    double value(int64_t j, int64_t i1, int64_t i2, int64_t i3) const {
        return data[static_cast<size_t>(rows.offset + j + i1 * rows.stride[1] +
                                        i2 * rows.stride[2] + i3 * rows.stride[3])];
    }

    double square(int64_t j, int64_t i1, int64_t i2, int64_t i3) const {
        return value(j, i1, i2, i3) * value(j, i1, i2, i3);
    }
};

struct Reference {
    std::vector<double>  sums;
    std::vector<int64_t> counts;
    std::vector<double>  signed_sums = std::vector<double>(sums.size());
};

void check_equal(const Harness & harness, const std::string & name, const Reference & want) {
    const size_t index = harness.sums.find(name);
    CHECK(index != Sums::npos && harness.sums.weights()[index].slot != Sums::npos);
    if (index == Sums::npos || harness.sums.weights()[index].slot == Sums::npos) {
        return;
    }
    const Sums::Slot & slot = harness.sums.slots()[harness.sums.weights()[index].slot];
    CHECK(slot.total_counts == want.counts);
    CHECK(slot.total.size() == want.sums.size());
    for (size_t i = 0; i < std::min(slot.total.size(), want.sums.size()); ++i) {
        CHECK(near(slot.total[i], want.sums[i]));
    }
    CHECK(slot.signed_total.size() == want.signed_sums.size());
    for (size_t i = 0; i < std::min(slot.signed_total.size(), want.signed_sums.size()); ++i) {
        // values near 1, at most a few hundred
        CHECK(std::abs(slot.signed_total[i] - want.signed_sums[i]) <= 1e-3);
    }
}

void check_dense(Where where, bool device_sums) {
    Harness harness(where);
    harness.hook.set_device_sums(device_sums);
    for (int round = 0; round < 40; ++round) {
        const int64_t     n_in = any(1, 40), w2 = any(1, 3), w3 = any(1, 2);
        const int64_t     n1 = any(1, 9), n2 = w2 * any(1, 3), n3 = w3 * any(1, 2);
        const Activation  x(n_in, n1, n2, n3);
        const std::string name = "blk." + std::to_string(round) + ".ffn_up.weight";
        const std::string gate = "blk." + std::to_string(round) + ".ffn_gate.weight";
        harness.hook.begin_chunk();
        harness.hook.begin_decode({});
        const std::vector<Product> products{{name, 4, w2, w3, 0, -1}, {gate, 2, w2, w3, 0, -1}};
        Reference want{std::vector<double>(static_cast<size_t>(n_in * w2 * w3)), {0}};
        for (int ubatch = 0; ubatch < 2; ++ubatch) {
            CHECK(harness.run({x.rows}, {}, products, false).empty());
            for (int64_t i3 = 0; i3 < n3; ++i3) {
                for (int64_t i2 = 0; i2 < n2; ++i2) {
                    for (int64_t i1 = 0; i1 < n1; ++i1) {
                        for (int64_t j = 0; j < n_in; ++j) {
                            const size_t at =
                                static_cast<size_t>(((i3 % w3) * w2 + i2 % w2) * n_in + j);
                            want.sums[at] += x.square(j, i1, i2, i3);
                            want.signed_sums[at] += x.value(j, i1, i2, i3);
                        }
                    }
                }
            }
            want.counts[0] += n1 * n2 * n3 / (w2 * w3);
        }
        harness.hook.finish_chunk();
        CHECK(harness.hook.error().kind == Failure::none && harness.hook.groups_agree());
        harness.sums.commit();
        check_equal(harness, name, want);
        check_equal(harness, gate, want);
    }
    CHECK((harness.hook.counters().fetched_bytes > 0) == (where != Where::host));
}

void check_experts(Where where, bool device_sums) {
    Harness harness(where);
    harness.hook.set_device_sums(device_sums);
    for (int round = 0; round < 40; ++round) {
        const int64_t    n_in = any(1, 40), n_expert = any(1, 6), n_tokens = any(1, 12);
        const int64_t    n_used = any(1, n_expert);
        const int64_t    n1     = any(0, 1) == 1 ? n_used : 1;
        const Activation x(n_in, n1, n_tokens, 1);

        std::vector<int32_t> id_data;
        const int64_t        id_stride = n_expert; // a view of the first n_used of all of them
        for (int64_t token = 0; token < n_tokens; ++token) {
            std::vector<int32_t> order(static_cast<size_t>(n_expert));
            for (size_t e = 0; e < order.size(); ++e) {
                order[e] = static_cast<int32_t>(e);
            }
            std::shuffle(order.begin(), order.end(), g_random);
            id_data.insert(id_data.end(), order.begin(), order.end());
        }
        const Ids ids{id_data.data(), id_data.size(), n_used, n_tokens, id_stride, 0};

        const std::string name = "blk." + std::to_string(round) + ".ffn_down_exps.weight";
        harness.hook.begin_chunk();
        harness.hook.begin_decode({});
        CHECK(harness.run({x.rows}, {ids}, {{name, 3, n_expert, 1, 0, 0}}, false).empty());
        Reference want{std::vector<double>(static_cast<size_t>(n_in * n_expert)),
                       std::vector<int64_t>(static_cast<size_t>(n_expert))};
        for (int64_t token = 0; token < n_tokens; ++token) {
            for (int64_t used = 0; used < n_used; ++used) {
                const auto e =
                    static_cast<size_t>(id_data[static_cast<size_t>(token * id_stride + used)]);
                ++want.counts[e];
                for (int64_t j = 0; j < n_in; ++j) {
                    const size_t at = e * static_cast<size_t>(n_in) + static_cast<size_t>(j);
                    want.sums[at] += x.square(j, used % n1, token, 0);
                    want.signed_sums[at] += x.value(j, used % n1, token, 0);
                }
            }
        }
        harness.hook.finish_chunk();
        CHECK(harness.hook.error().kind == Failure::none);
        harness.sums.commit();
        check_equal(harness, name, want);
    }
}

void check_errors() {
    Harness                    harness(Where::host);
    Activation                 x(8, 2, 3, 1);
    const std::vector<Product> product{{"blk.0.w.weight", 2, 1, 1, 0, -1}};

    x.data[static_cast<size_t>(x.rows.offset + 5)] = std::numeric_limits<float>::quiet_NaN();
    harness.hook.begin_chunk();
    harness.hook.begin_decode({});
    harness.run({x.rows}, {}, product, false);
    CHECK(harness.hook.error().kind == Failure::non_finite && harness.hook.error().channel == 5);
    CHECK(harness.hook.error().weight == "blk.0.w.weight" && harness.hook.error().mat == -1);
    harness.sums.discard();

    const std::vector<int32_t> bad{0, 7};
    Activation                 y(8, 1, 2, 1);
    harness.hook.begin_chunk();
    harness.hook.begin_decode({});
    harness.run({y.rows}, {{bad.data(), 2, 1, 2, 1, 0}}, {{"blk.0.e.weight", 2, 4, 1, 0, 0}}, true);
    CHECK(harness.hook.error().kind == Failure::bad_expert && harness.hook.error().mat == 7);
    harness.sums.discard();

    Activation z(4, 2, 1, 1);
    harness.hook.begin_chunk();
    harness.hook.begin_decode({});
    harness.run({z.rows}, {}, product, false);
    CHECK(harness.hook.error().kind == Failure::shape_changed);
    harness.sums.discard();

    // q and k share an activation in one graph and no longer in the next
    Activation                 a(8, 3, 1, 1), b(8, 3, 1, 1);
    const std::vector<Product> together{{"blk.1.q.weight", 2, 1, 1, 0, -1},
                                        {"blk.1.k.weight", 2, 1, 1, 0, -1}};
    const std::vector<Product> apart{{"blk.1.q.weight", 2, 1, 1, 0, -1},
                                     {"blk.1.k.weight", 2, 1, 1, 1, -1}};
    for (int attempt = 0; attempt < 2; ++attempt) {
        harness.hook.begin_chunk();
        harness.hook.begin_decode({});
        harness.run({a.rows}, {}, together, false);
        harness.hook.begin_decode({});
        harness.run({a.rows, b.rows}, {}, apart, false);
        if (attempt == 0) {
            CHECK(harness.hook.error().kind == Failure::regroup || !harness.hook.groups_agree());
            harness.sums.ungroup();
            harness.hook.stop_grouping();
        }
    }
    CHECK(harness.hook.error().kind == Failure::none && harness.hook.groups_agree());
    harness.sums.commit();
    Reference q{std::vector<double>(8), {6}}, k{std::vector<double>(8), {6}};
    for (int64_t i1 = 0; i1 < 3; ++i1) {
        for (int64_t j = 0; j < 8; ++j) {
            q.sums[static_cast<size_t>(j)] += 2 * a.square(j, i1, 0, 0);
            q.signed_sums[static_cast<size_t>(j)] += 2 * a.value(j, i1, 0, 0);
            k.signed_sums[static_cast<size_t>(j)] += a.value(j, i1, 0, 0) + b.value(j, i1, 0, 0);
            k.sums[static_cast<size_t>(j)] += a.square(j, i1, 0, 0) + b.square(j, i1, 0, 0);
        }
    }
    check_equal(harness, "blk.1.q.weight", q);
    check_equal(harness, "blk.1.k.weight", k);
}

void on_line(int, const char *) {}

std::vector<std::string> g_lines;
void                     keep_line(int, const char * line) { g_lines.emplace_back(line); }

// A device that cannot do the operations: its rows are copied, and that is said once.
void check_refusal() {
    for (const char * op : {"SQR", "GET_ROWS", "CPY"}) {
        far_device_refuse(op);
        g_lines.clear();
        set_log_sink(keep_line, 2);
        check_dense(Where::device, true);
        const bool dense = std::string(op) != "GET_ROWS";
        CHECK(!dense || !g_lines.empty());
        g_lines.clear();
        check_experts(Where::device, true);
        CHECK(g_lines.size() == 1 && g_lines[0].find("Far0") != std::string::npos &&
              g_lines[0].find(op) != std::string::npos);
        set_log_sink(nullptr, 4);
    }
    far_device_refuse(nullptr);
}

bool refused(const Status & status, const char * why) {
    return status.code == Code::bad_argument && status.message.find(why) != std::string::npos;
}

// A head takes one chunk at a time: of two in a decode, the first slots of one would get the
// trunk's rows of the other. Whoever opens contexts is refused, whatever Python has checked, and
// nothing is left open.
void check_one_chunk_a_head(const Model & model, SessionParams params) {
    const std::vector<int32_t> tokens(8, 1);
    const int32_t              lengths[2] = {4, 4};
    ChunkScore                 scores[2];
    Session                    session(model, &model);
    params.mtp = true;
    for (const int32_t n_seq : {2, 3, 0, -1}) {
        params.n_seq = n_seq;
        CHECK(refused(session.open(params), "one chunk at a time: n_seq must be 1, got"));
        CHECK(refused(session.step(tokens.data(), lengths, 2, scores), "not open"));
        CHECK(session.memory().empty() && session.sums().slots().empty());
    }
    params.n_seq = 1; // an open session that is refused another opening is not open either
    CHECK(session.open(params).ok());
    CHECK(refused(session.step(tokens.data(), lengths, 2, scores), "1 to n_seq chunks"));
    params.n_seq = 2;
    CHECK(!session.open(params).ok());
    CHECK(refused(session.step(tokens.data(), lengths, 1, scores), "not open"));
    params.mtp = false; // a trunk alone takes several
    CHECK(session.open(params).ok());
    CHECK(session.step(tokens.data(), lengths, 2, scores).ok());

    std::atomic<bool> cancelled{false};
    Contexts          contexts(model, &model, cancelled);
    ContextsParams    needs; // as an evaluator opens them, which has no n_seq of its own
    needs.mtp   = true;
    needs.n_seq = 2;
    CHECK(refused(contexts.open(needs), "one chunk at a time: n_seq must be 1, got 2"));
    CHECK(!contexts.is_open() && !contexts.has_head());
}

// A head is asked for and no model holds one; or what is run was never opened.
void check_without_head(const Model & model, SessionParams params) {
    const int32_t token = 1;
    params.mtp          = true;
    EvaluatorParams evaluated;
    evaluated.mtp = true;
    ChunkEvaluation found;
    // no model for the head, and a model that has none
    for (const Model * head : {static_cast<const Model *>(nullptr), &model}) {
        if (head != nullptr && head->n_heads() > 0) {
            continue;
        }
        Session session(model, head);
        CHECK(refused(session.open(params), "no model with a head"));
        CHECK(refused(session.step(&token, &token, 1, nullptr), "not open"));
        Evaluator evaluator(model, head, nullptr, nullptr);
        CHECK(refused(evaluator.step(&token, 1, found), "not open"));
        CHECK(refused(evaluator.open(evaluated), "no model with a head"));
        CHECK(refused(evaluator.step(&token, 1, found), "not open"));
    }
    if (model.n_heads() > 0) { // the model has one, its reference none
        Evaluator evaluator(model, &model, &model, nullptr);
        CHECK(refused(evaluator.open(evaluated), "no model with a head"));
        CHECK(refused(evaluator.step(&token, 1, found), "not open"));
    }
}

// Chunks in the decodes that take them through the trunk: every token once, at its position, in the
// sequence of its chunk.
void check_trunk_decodes(const Model & model) {
    std::atomic<bool> cancelled{false};
    Contexts          contexts(model, nullptr, cancelled);
    ContextsParams    needs;
    needs.n_ctx   = 16;
    needs.n_batch = needs.n_ubatch = 9;
    needs.n_seq                    = 3;
    CHECK(contexts.open(needs).ok());
    const std::vector<int32_t> tokens{10, 11, 12, 13, 14, 15, 16, 20, 30, 31, 32, 33};
    const int32_t              lengths[3] = {7, 1, 4};
    const Chunks               chunks{tokens.data(), lengths, 3};
    CHECK(chunks.longest() == 7 && chunks.total() == 12 && chunks.text(2)[0] == 30);
    // three positions of three chunks a decode; what a chunk no longer has is left out
    const std::vector<std::vector<int32_t>> want{
        {10, 11, 12, 20, 30, 31, 32}, {13, 14, 15, 33}, {16}};
    const std::vector<TrunkDecode> found = contexts.trunk_decodes(chunks);
    CHECK(found.size() == want.size());
    for (size_t k = 0; k < std::min(found.size(), want.size()); ++k) {
        CHECK(found[k].first_chunk == 0 && found[k].rows.size() == want[k].size());
        for (size_t i = 0; i < std::min(found[k].rows.size(), want[k].size()); ++i) {
            const Row & row = found[k].rows[i];
            CHECK(row.token == want[k][i] && row.seq == row.token / 10 - 1 &&
                  row.pos == row.token % 10 && row.state == nullptr && !row.output);
        }
    }
}

// A session from its opening to its end: chunks, scores by several threads, a cancelled step, a
// second session beside it, and the log's settings changed all the while.
void check_session(const std::string & path) {
    set_log_sink(on_line, 3);
    ModelHeader file;
    CHECK(read_model_header(path, file).ok());
    CHECK(!read_model_header(path + ".missing", file).ok());

    const bool has_head =
        std::any_of(file.integers.begin(), file.integers.end(), [](const auto & key) {
            return key.first == "nextn_predict_layers" && key.second > 0;
        });

    Model       model;
    ModelParams model_params;
    model_params.path = path;
    model_params.mtp  = has_head;
    Status status     = model.load(model_params);
    CHECK(status.ok());
    if (!status.ok()) {
        std::printf("%s\n", status.message.c_str());
        return;
    }
    SessionParams params;
    params.n_ctx      = 48;
    params.n_batch    = 24; // two decodes a chunk
    params.n_ubatch   = 16; // two graphs a decode, the last one shorter
    params.n_threads  = 2;
    params.mtp        = has_head;
    params.perplexity = true;
    std::vector<int32_t> tokens(48);
    for (int32_t & token : tokens) {
        token = static_cast<int32_t>(any(0, model.n_vocab() - 1));
    }
    const int32_t length = 48;
    check_without_head(model, params);
    check_trunk_decodes(model);
    if (params.mtp) {
        check_one_chunk_a_head(model, params);
    }

    std::vector<double> first;
    for (int round = 0; round < 2; ++round) {
        Session session(model, &model);
        status = session.open(params);
        CHECK(status.ok());
        if (!status.ok()) {
            std::printf("%s\n", status.message.c_str());
            return;
        }
        ChunkScore score;
        status = session.step(tokens.data(), &length, 1, &score);
        CHECK(status.ok() && score.n_scored == 23);
        if (!status.ok()) {
            std::printf("%s\n", status.message.c_str());
        }
        session.cancel();
        CHECK(session.step(tokens.data(), &length, 1, nullptr).code == Code::cancelled);
        session.clear_cancel();
        std::thread other([&] {
            for (int i = 0; i < 100; ++i) {
                set_log_sink(i % 2 == 0 ? on_line : nullptr, 1 + i % 4);
                first_error();
            }
            session.cancel();
        });
        const Code  code = session.step(tokens.data(), &length, 1, &score).code;
        other.join();
        CHECK(code == Code::ok || code == Code::cancelled);
        const int32_t beyond = model.n_vocab();
        const int32_t one    = 1;
        session.clear_cancel();
        CHECK(session.step(&beyond, &one, 1, nullptr).code != Code::ok);
        CHECK(!session.sums().slots().empty());
        if (code == Code::cancelled) { // the cancelled chunks left nothing behind
            std::vector<double> all;
            for (const Sums::Slot & slot : session.sums().slots()) {
                all.insert(all.end(), slot.total.begin(), slot.total.end());
            }
            CHECK(first.empty() || first == all);
            first = all;
        }
    }
    set_log_sink(nullptr, 4);
}

} // namespace

int main(int argc, char ** argv) {
    for (const Where where : {Where::host, Where::device, Where::offload}) {
        for (const bool device_sums : {false, true}) {
            check_dense(where, device_sums);
            check_experts(where, device_sums);
        }
    }
    check_refusal();
    check_errors();
    for (int i = 1; i < argc; ++i) {
        check_session(argv[i]);
    }
    CHECK(Session::live() == 0 && Evaluator::live() == 0 && Sums::live() == 0 &&
          g_live_contexts == 0 && g_live_models == 0);
    std::printf(g_failed == 0 ? "ok\n" : "%d checks failed\n", g_failed);
    return g_failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
