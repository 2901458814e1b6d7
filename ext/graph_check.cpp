#include "graph_check.h"

#include "ggml.h"

#include <cstring>
#include <string>

namespace imatrix {
namespace {

int32_t int_param(const ggml_tensor * node, size_t i) {
    int32_t value;
    std::memcpy(&value, node->op_params + i, sizeof value);
    return value;
}

float float_param(const ggml_tensor * node, size_t i) {
    float value;
    std::memcpy(&value, node->op_params + i, sizeof value);
    return value;
}

bool is_float(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

// The weight that a source is, or is a view of.
const ggml_tensor * origin(const ggml_tensor * tensor) {
    while (tensor->view_src != nullptr) {
        tensor = tensor->view_src;
    }
    return tensor;
}

std::string name_of(const ggml_tensor * tensor) {
    const char * name = origin(tensor)->name;
    return name[0] == '\0' ? "a tensor" : name;
}

Status bad_type(const ggml_tensor * tensor, const ggml_tensor * node) {
    return Status::failed(Code::bad_model, name_of(tensor) + " is of type " +
                                               ggml_type_name(tensor->type) +
                                               ", which the engine cannot use there (" +
                                               ggml_op_name(node->op) + ")");
}

Status bad_value(const ggml_tensor * node, const std::string & what) {
    return Status::failed(Code::bad_model, "the metadata make a graph that cannot run: " + what +
                                               " at " + name_of(node) + " (" +
                                               ggml_op_name(node->op) + ")");
}

// The types that binary_op and ggml_compute_forward_add (binary-ops.cpp, ops.cpp) know.
bool adds_up(const ggml_tensor * node) {
    const ggml_type a = node->src[0]->type;
    const ggml_type b = node->src[1]->type;
    if (ggml_is_quantized(a)) {
        return node->op == GGML_OP_ADD && b == GGML_TYPE_F32;
    }
    return is_float(a) && (b == GGML_TYPE_F32 || (b == a && node->type == a));
}

// ggml_compute_forward_rope_flt and ggml_mrope_cache_init (ops.cpp)
Status check_rope(const ggml_tensor * node) {
    const int64_t width  = node->ne[0];
    const int64_t n_dims = int_param(node, 1);
    const int32_t mode   = int_param(node, 2);
    if (n_dims < 2 || n_dims > width || n_dims % 2 != 0) {
        return bad_value(node, "rope over " + std::to_string(n_dims) + " dimensions of " +
                                   std::to_string(width) + " (rope.dimension_count)");
    }
    const int32_t offset = int_param(node, 15);
    if (offset < 0 || offset % 2 != 0 || offset + n_dims > width) {
        return bad_value(node, "rope from dimension " + std::to_string(offset));
    }
    if ((mode & GGML_ROPE_TYPE_MROPE) != 0) {
        int64_t sum = 0;
        bool    ok  = true;
        for (size_t i = 0; i < 4; ++i) {
            const int32_t section = int_param(node, 11 + i);
            ok &= section >= 0;
            sum += section;
        }
        if (!ok || sum < 1 || sum > width || int_param(node, 11 + 3) == sum) {
            return bad_value(node, "rope in sections of " + std::to_string(sum) +
                                       " dimensions (rope.dimension_sections)");
        }
    }
    const ggml_tensor * factors = node->src[2];
    if (factors != nullptr &&
        (factors->type != GGML_TYPE_F32 || ggml_nelements(factors) < n_dims / 2)) {
        return bad_type(factors, node);
    }
    return {};
}

Status check_node(const ggml_tensor * node) {
    const ggml_tensor * a = node->src[0];
    const ggml_tensor * b = node->src[1];
    switch (node->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            if (!is_float(a->type) && !ggml_is_quantized(a->type)) {
                return bad_type(a, node);
            }
            if (b->type != GGML_TYPE_F32 && b->type != a->type) {
                return bad_type(b, node);
            }
            return {};
        case GGML_OP_GET_ROWS:
            if (!is_float(a->type) && !ggml_is_quantized(a->type) && a->type != GGML_TYPE_I32) {
                return bad_type(a, node);
            }
            return {};
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
            if (!adds_up(node)) {
                return bad_type(origin(a)->op == GGML_OP_NONE && a->type != GGML_TYPE_F32 ? a : b,
                                node);
            }
            return {};
        case GGML_OP_ADD_ID:
        case GGML_OP_SSM_CONV:
        case GGML_OP_SSM_SCAN:
            for (const ggml_tensor * source : {a, b}) {
                if (source->type != GGML_TYPE_F32) {
                    return bad_type(source, node);
                }
            }
            return {};
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_GROUP_NORM: {
            if (a->type != GGML_TYPE_F32) {
                return bad_type(a, node);
            }
            const float eps = float_param(node, node->op == GGML_OP_GROUP_NORM ? 1 : 0);
            if (!(eps >= 0.0F)) { // and not a NaN
                return bad_value(node, "an epsilon of " + std::to_string(eps) +
                                           " (attention.layer_norm_*epsilon)");
            }
            return {};
        }
        case GGML_OP_ROPE: return check_rope(node);
        default:           return {};
    }
}

} // namespace

Status check_graph(ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        Status status = check_node(ggml_graph_node(graph, i));
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

} // namespace imatrix
