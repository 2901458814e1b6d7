// _imatrix_testing: the native core's inner parts for the tests. Built on request, never installed.
#include "far_device.h"
#include "harness.h"
#include "tensor_shapes.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace imatrix;
using namespace imatrix::testing;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ints   = py::array_t<int32_t, py::array::c_style>;

const char * failure_name(Failure kind) {
    switch (kind) {
        case Failure::none:          return "none";
        case Failure::non_finite:    return "non_finite";
        case Failure::bad_expert:    return "bad_expert";
        case Failure::bad_layout:    return "bad_layout";
        case Failure::shape_changed: return "shape_changed";
        case Failure::regroup:       return "regroup";
        case Failure::device_failed: return "device_failed";
        case Failure::out_of_memory: return "out_of_memory";
    }
    return "?";
}

// The array itself: a converted copy would be gone before the graph reads it.
template <typename Array> Array exactly(const py::handle & given) {
    if (!py::isinstance<Array>(given)) {
        throw py::type_error("a contiguous array of float32 (rows) or int32 (ids)");
    }
    return given.cast<Array>();
}

Rows rows_of(const py::tuple & given) { // (data, ne, stride, offset)
    const auto data = exactly<Floats>(given[0]);
    Rows       rows;
    rows.data   = data.data();
    rows.size   = static_cast<size_t>(data.size());
    rows.ne     = given[1].cast<std::array<int64_t, 4>>();
    rows.stride = given[2].cast<std::array<int64_t, 4>>();
    rows.offset = given[3].cast<int64_t>();
    return rows;
}

Ids ids_of(const py::tuple & given) { // (data, n_used, n_rows, stride, offset)
    const auto data = exactly<Ints>(given[0]);
    Ids        ids;
    ids.data   = data.data();
    ids.size   = static_cast<size_t>(data.size());
    ids.n_used = given[1].cast<int64_t>();
    ids.n_rows = given[2].cast<int64_t>();
    ids.stride = given[3].cast<int64_t>();
    ids.offset = given[4].cast<int64_t>();
    return ids;
}

Product product_of(const py::tuple & given) { // (weight, n_out, ne2, ne3, rows, ids)
    Product product;
    product.weight = given[0].cast<std::string>();
    product.n_out  = given[1].cast<int64_t>();
    product.ne2    = given[2].cast<int64_t>();
    product.ne3    = given[3].cast<int64_t>();
    product.rows   = given[4].cast<size_t>();
    product.ids    = given[5].cast<int>();
    return product;
}

template <typename T, typename F> std::vector<T> each(const py::list & given, F && convert) {
    std::vector<T> out;
    for (const py::handle & item : given) {
        out.push_back(convert(item.cast<py::tuple>()));
    }
    return out;
}

struct Given {
    std::vector<Rows>    rows;
    std::vector<Ids>     ids;
    std::vector<Product> products;

    Given(const py::list & r, const py::list & i, const py::list & p)
        : rows(each<Rows>(r, rows_of)), ids(each<Ids>(i, ids_of)),
          products(each<Product>(p, product_of)) {}
};

// name -> (sums [n_mat, n_in], counts [n_counts], rows of this chunk, slot or -1)
py::dict weights_of(const Harness & harness) {
    py::dict out;
    for (const Sums::Weight & weight : harness.sums.weights()) {
        const bool none   = weight.slot == Sums::npos;
        py::object sums   = py::none();
        py::object counts = py::none();
        if (!none) {
            const Sums::Slot & slot = harness.sums.slots()[weight.slot];
            sums   = py::array_t<double>({slot.shape.n_mat, slot.shape.n_in}, slot.total.data());
            counts = py::array_t<int64_t>(slot.shape.n_counts, slot.total_counts.data());
        }
        out[py::str(weight.name)] =
            py::make_tuple(sums, counts, weight.pending_rows,
                           none ? int64_t{-1} : static_cast<int64_t>(weight.slot));
    }
    return out;
}

// name -> signed sums [n_mat, n_in]; those that are kept
py::dict signed_of(const Harness & harness) {
    py::dict out;
    for (const Sums::Weight & weight : harness.sums.weights()) {
        if (weight.slot == Sums::npos) {
            continue;
        }
        const Sums::Slot & slot = harness.sums.slots()[weight.slot];
        if (!slot.signed_total.empty()) {
            out[py::str(weight.name)] =
                py::array_t<double>({slot.shape.n_mat, slot.shape.n_in}, slot.signed_total.data());
        }
    }
    return out;
}

// "device" and "offload" copy the rows to the host, "device-sums" and "offload-sums" do not
bool sums_there(const std::string & name) { return name.find("-sums") != std::string::npos; }

// "Vulkan0-offload-sums" is of one of the engine's devices, "offload-sums" of far_device.h's.
std::unique_ptr<Harness> make_harness(const std::string & name) {
    const std::string place = name.substr(0, name.find("-sums"));
    if (place == "host") {
        return std::make_unique<Harness>(Where::host);
    }
    for (const auto & [kind, where] :
         {std::pair{"device", Where::device}, std::pair{"offload", Where::offload}}) {
        const size_t at = place.find(kind);
        if (at != std::string::npos) {
            return std::make_unique<Harness>(where, at == 0 ? "" : place.substr(0, at - 1));
        }
    }
    throw py::value_error("host, device or offload");
}

} // namespace

PYBIND11_MODULE(_imatrix_testing, m) {
    py::class_<Harness>(m, "Harness")
        .def(py::init([](const std::string & where) {
                 auto made = make_harness(where);
                 made->hook.set_device_sums(sums_there(where));
                 return made;
             }),
             py::arg("where") = "host")
        .def("begin_chunk", [](Harness & h) { h.hook.begin_chunk(); })
        .def(
            "begin_decode",
            [](Harness & h, bool output) { h.hook.begin_decode({output, /*head=*/false}); },
            py::arg("output_weight") = false)
        .def("finish", [](Harness & h) { h.hook.finish_chunk(); })
        .def("commit",
             [](Harness & h) {
                 h.hook.finish_chunk();
                 h.sums.commit();
             })
        .def("discard",
             [](Harness & h) {
                 h.hook.settle();
                 h.sums.discard();
             })
        .def("ungroup",
             [](Harness & h) { // as Session::step does before it repeats a chunk
                 h.sums.ungroup();
                 h.hook.stop_grouping();
             })
        .def("keep_signed", [](Harness & h, bool on) { h.sums.keep_signed(on); })
        .def_property_readonly("signed_sums", signed_of)
        .def("set_enabled", [](Harness & h, bool enabled) { h.hook.set_enabled(enabled); })
        .def(
            "run",
            [](Harness & h, const py::list & rows, const py::list & ids, const py::list & products,
               bool replay) {
                const Given       given(rows, ids, products);
                const std::string why = h.run(given.rows, given.ids, given.products, replay);
                h.hook.settle(); // the graph's tensors, and what is wrong with them
                if (!why.empty()) {
                    throw std::runtime_error(why);
                }
            },
            py::arg("rows"), py::arg("ids"), py::arg("products"), py::arg("replay") = false)
        .def(
            "plan",
            [](Harness & h, const py::list & rows, const py::list & ids, const py::list & products,
               bool output_weight) {
                const Given given(rows, ids, products);
                py::dict    out;
                for (const PlannedWeight & w :
                     h.plan(given.rows, given.ids, given.products, output_weight)) {
                    out[py::str(w.name)] = w.rows;
                }
                return out;
            },
            py::arg("rows"), py::arg("ids"), py::arg("products"), py::arg("output_weight") = false)
        .def(
            "end_of", // (wanted nodes, nodes with an effect)
            [](Harness & h, const py::list & rows, const py::list & ids,
               const py::list & products) {
                const Given    given(rows, ids, products);
                const GraphEnd end = h.end(given.rows, given.ids, given.products);
                return py::make_tuple(end.n_wanted, end.n_effects);
            },
            py::arg("rows"), py::arg("ids"), py::arg("products"))
        .def("end_after", [](Harness & h, int64_t n_wanted,
                             int64_t n_effects) { h.hook.end_after({n_wanted, n_effects}); })
        .def_property_readonly("ended", [](const Harness & h) { return h.hook.counters().ended; })
        .def_readonly("copied", &Harness::copied)
        .def_property_readonly("weights", weights_of)
        .def_property_readonly("groups_agree",
                               [](const Harness & h) { return h.hook.groups_agree(); })
        .def_property_readonly("error", // (kind, weight, mat, channel)
                               [](const Harness & h) {
                                   const HookError & e = h.hook.error();
                                   return py::make_tuple(failure_name(e.kind), e.weight, e.mat,
                                                         e.channel);
                               })
        .def_property_readonly("counters", [](const Harness & h) { // stops, bytes, elements
            const HookCounters & c = h.hook.counters();
            return py::make_tuple(c.stops, c.fetched_bytes, c.squared_elements);
        });

    m.def("plain_name", [](const std::string & name) { return plain_name(name.c_str()); });
    m.def("far_device_protects", far_device_protects);
    m.def("far_device_lose", far_device_lose);
    m.def("tensor_shapes", [](const std::string & path) { // [(name, ne, type), ...]
        py::list out;
        for (const TensorShape & shape : tensor_shapes(path)) {
            out.append(py::make_tuple(shape.name, py::tuple(py::cast(shape.ne)), shape.type));
        }
        return out;
    });
}
