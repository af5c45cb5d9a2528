// Python's side of relocate.h and move.h: checks, converts, registers.
//
// All that the copies rely on is checked here, once: whatever Python hands over, nothing outside of
// it is read or written. Lists are copied first, so that no other thread changes them under the
// loops. No torch: one build serves every torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "move.h"
#include "relocate.h"

namespace py = pybind11;

namespace megatron_idea {
namespace {

// Contiguous and of this type. Arguments are never converted: a copy would be filled in vain.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Bytes = Array<std::uint8_t>;
using Shape = std::vector<py::ssize_t>;

void require(bool legal, const char* complaint) {
    if (!legal) throw std::invalid_argument(complaint);
}

void require_shape(const py::array& array, const Shape& wanted, const char* name) {
    const Shape found(array.shape(), array.shape() + array.ndim());
    if (found == wanted) return;
    const auto text = [](const Shape& shape) { return std::string(py::str(py::cast(shape))); };
    throw std::invalid_argument(name + (" is " + text(found)) + ", not " + text(wanted));
}

// The elements of a list, which may lie at any address.
template <class Element, class T>
std::vector<Element> copied(const Array<T>& list) {
    static_assert(sizeof(Element) == sizeof(T));
    require(list.ndim() == 1, "a list has one dimension");
    std::vector<Element> result(list.size());
    if (!result.empty()) std::memcpy(result.data(), list.data(), list.nbytes());
    return result;
}

Index index_of(const Array<std::int64_t>& list, const Layout& layout) {
    require(layout.units <= std::numeric_limits<std::uint32_t>::max(), "too many units");
    Index index;
    index.reserve(list.size());
    for (const auto unit : copied<std::int64_t>(list)) {
        if (unit < 0 || unit >= layout.units)
            throw std::invalid_argument("index " + std::to_string(unit) + " is no unit of " +
                                        std::to_string(layout.units));
        index.push_back(static_cast<std::uint32_t>(unit));
    }
    return index;
}

Layout layout_of(const Bytes& tensor) {
    require(tensor.ndim() == 3, "a tensor is [outer, units, slice]");
    return {tensor.shape(0), tensor.shape(1), tensor.shape(2)};
}

// Calls copy(from, to) without the GIL.
template <class Copy>
void run(const Bytes& from, Bytes& to, Copy copy) {
    require(to.writeable(), "what is written is read-only");
    require(from.data() + from.size() <= to.data() || to.data() + to.size() <= from.data(),
            "what is read and what is written overlap");
    const auto* in = reinterpret_cast<const std::byte*>(from.data());
    auto* out = reinterpret_cast<std::byte*>(to.mutable_data());
    const py::gil_scoped_release release;
    copy(in, out);
}

void bound_relocate(const std::vector<Array<std::int64_t>>& ids,
                    const std::vector<Array<bool>>& keep, bool ordered,
                    Array<std::int64_t>& sources) {
    require(ids.size() == keep.size() && !ids.empty(), "ids and keep are not one per rank");
    std::vector<RankUnits> ranks;
    for (std::size_t r = 0; r < ids.size(); ++r) {
        ranks.push_back({copied<std::int64_t>(ids[r]), copied<std::uint8_t>(keep[r])});
        require(ranks[r].ids.size() == ranks[r].keep.size(), "ids and keep differ in length");
    }
    const auto placed = relocate(ranks, ordered ? Placement::ordered : Placement::min);
    require_shape(sources, {static_cast<py::ssize_t>(placed.size()), 2}, "sources");
    require(sources.writeable(), "what is written is read-only");
    std::memcpy(sources.mutable_data(), placed.data(), sources.nbytes());
}

void bound_gather(const Bytes& from, const Array<std::int64_t>& index, Bytes& to) {
    const Layout layout = layout_of(from);
    const Index units = index_of(index, layout);
    require_shape(to, {from.shape(0), index.size(), from.shape(2)}, "to");
    run(from, to, [&](auto* in, auto* out) { gather(in, layout, units, out); });
}

void bound_pack(const Bytes& from, const Array<std::int64_t>& index, Bytes& message) {
    const Layout layout = layout_of(from);
    const Index units = index_of(index, layout);
    require_shape(message, {index.size(), from.shape(0), from.shape(2)}, "message");
    run(from, message, [&](auto* in, auto* out) { pack(in, layout, units, out); });
}

void bound_unpack(const Bytes& message, const Array<std::int64_t>& index, Bytes& to) {
    const Layout layout = layout_of(to);
    const Index units = index_of(index, layout);
    require_shape(message, {index.size(), to.shape(0), to.shape(2)}, "message");
    run(message, to, [&](auto* in, auto* out) { unpack(in, units, out, layout); });
}

}  // namespace
}  // namespace megatron_idea

PYBIND11_MODULE(_C, m) {
    using namespace megatron_idea;
    m.doc() = "Where units go and how they are copied: csrc/relocate.h, csrc/move.h.";
    const auto as_is = [](const char* name) { return py::arg(name).noconvert(); };
    m.def("relocate", &bound_relocate, as_is("ids"), as_is("keep"), as_is("ordered"),
          as_is("sources"), "Fill sources [survivors, 2] with (rank, local index).");
    m.def("gather", &bound_gather, as_is("source"), as_is("index"), as_is("to"),
          "to[:, j] = source[:, index[j]], as bytes [outer, units, slice].");
    m.def("pack", &bound_pack, as_is("source"), as_is("index"), as_is("message"),
          "message[j] = source[:, index[j]], as bytes [units, outer, slice].");
    m.def("unpack", &bound_unpack, as_is("message"), as_is("index"), as_is("to"),
          "to[:, index[j]] = message[j], as bytes.");
}
