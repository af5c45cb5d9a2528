// Python's side of plan.h and move.h: converts, checks, registers.
//
// Tensors come in through the buffer protocol, which knows their size: whatever Python hands over,
// nothing outside of it is read or written. No torch: one build serves every torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "move.h"
#include "plan.h"

namespace py = pybind11;

namespace megatron_idea {
namespace {

void require(bool legal, const std::string& complaint) {
    if (!legal) throw std::invalid_argument(complaint);
}

// A buffer that stays alive, contiguous and of known size as long as this object does.
class Buffer {
public:
    Buffer(const py::buffer& object, const char* name, py::ssize_t dimensions,
           py::ssize_t item_bytes, bool writable = false)
        : name_(name) {
        // Not request(writable): its error for a read-only one is a BufferError.
        info_ = object.request();
        require(!writable || !info_.readonly, name_ + " is read-only");
        require(info_.ndim == dimensions,
                name_ + " has " + std::to_string(info_.ndim) + " dimensions, not " +
                    std::to_string(dimensions));
        require(info_.itemsize == item_bytes,
                name_ + " has items of " + std::to_string(info_.itemsize) + " bytes, not " +
                    std::to_string(item_bytes));
        py::ssize_t stride = info_.itemsize;
        for (py::ssize_t d = info_.ndim; d-- > 0; stride *= info_.shape[d])
            require(info_.shape[d] <= 1 || info_.strides[d] == stride,
                    name_ + " is not contiguous");
        require(reinterpret_cast<std::uintptr_t>(info_.ptr) % item_bytes == 0,
                name_ + " is not aligned");
    }

    py::ssize_t size(py::ssize_t dimension) const { return info_.shape[dimension]; }
    std::byte* data() const { return static_cast<std::byte*>(info_.ptr); }
    const std::string& name() const { return name_; }
    const std::string& format() const { return info_.format; }

    bool overlaps(const Buffer& other) const {
        const auto begin = reinterpret_cast<std::uintptr_t>(info_.ptr);
        const auto others = reinterpret_cast<std::uintptr_t>(other.info_.ptr);
        return begin < others + other.bytes() && others < begin + bytes();
    }

private:
    std::uintptr_t bytes() const { return info_.size * info_.itemsize; }

    std::string name_;
    py::buffer_info info_;
};

// 64-bit integers of any kind and name: int64 has another format letter on each platform.
Buffer integers(const py::buffer& object, const char* name) {
    Buffer buffer(object, name, 1, 8);
    require(buffer.format().find_first_of("lq") != std::string::npos,
            buffer.name() + " is not int64");
    return buffer;
}

Indices indices(const Buffer& buffer) {
    return {reinterpret_cast<const std::int64_t*>(buffer.data()), buffer.size(0)};
}

// fc1 and fc2 as bytes: [states, 2 neurons, hidden e] and [states, hidden, neurons e].
FfnShape ffn_shape(const Buffer& fc1, const Buffer& fc2) {
    const std::string both = fc1.name() + " and " + fc2.name();
    const FfnShape shape{fc1.size(0), fc1.size(1) / 2, fc2.size(1),
                         fc2.size(1) ? fc1.size(2) / fc2.size(1) : 0};
    require(shape.states > 0 && shape.neurons > 0 && shape.hidden > 0, both + " are empty");
    const auto e = shape.element_bytes;
    require(e == 1 || e == 2 || e == 4 || e == 8, both + " do not agree on the hidden size");
    require(fc1.size(1) == 2 * shape.neurons && fc1.size(2) == shape.hidden * e &&
                fc2.size(0) == shape.states && fc2.size(2) == shape.neurons * e,
            both + " do not have the shapes of one FFN");
    return shape;
}

void require_apart(const Buffer& written, const std::vector<const Buffer*>& others) {
    for (const Buffer* other : others)
        require(!written.overlaps(*other), written.name() + " overlaps " + other->name());
}

void require_message(const Buffer& message, Indices index, const FfnShape& shape) {
    // By division: a product could be too large for 64 bits.
    require(message.size(0) % shape.neuron_bytes() == 0 &&
                message.size(0) / shape.neuron_bytes() == index.count,
            "message has " + std::to_string(message.size(0)) + " bytes for " +
                std::to_string(index.count) + " neurons of " +
                std::to_string(shape.neuron_bytes()));
}

void bound_relocate(const std::vector<py::buffer>& ids, const std::vector<py::buffer>& keep,
                    bool ordered, const py::buffer& sources) {
    require(ids.size() == keep.size() && !ids.empty(), "ids and keep are not one per rank");
    std::vector<Buffer> held;  // keeps the buffers alive
    held.reserve(2 * ids.size());
    std::vector<RankNeurons> ranks;
    for (std::size_t r = 0; r < ids.size(); ++r) {
        const Buffer& id = held.emplace_back(integers(ids[r], "ids"));
        const Indices list = indices(id);
        const Buffer& mask = held.emplace_back(keep[r], "keep", 1, 1);
        require(mask.size(0) == list.count, "ids and keep differ in length");
        ranks.push_back(
            {list.data, reinterpret_cast<const std::uint8_t*>(mask.data()), list.count});
    }
    const Buffer out(sources, "sources", 2, 8, true);
    for (const Buffer& input : held) require_apart(out, {&input});
    std::vector<Source> placed;
    {
        const py::gil_scoped_release release;
        placed = relocate(ranks, ordered ? Placement::ordered : Placement::min);
    }
    require(out.size(0) == static_cast<py::ssize_t>(placed.size()) && out.size(1) == 2,
            "sources is not [" + std::to_string(placed.size()) + ", 2]");
    auto* to = reinterpret_cast<std::int64_t*>(out.data());
    for (const Source& source : placed) {
        *to++ = source.rank;
        *to++ = source.index;
    }
}

void bound_gather(const py::buffer& fc1, const py::buffer& fc2, const py::buffer& index,
                  const py::buffer& fc1_out, const py::buffer& fc2_out) {
    const Buffer in1(fc1, "fc1", 3, 1), in2(fc2, "fc2", 3, 1), wanted = integers(index, "index");
    const Buffer out1(fc1_out, "fc1_out", 3, 1, true), out2(fc2_out, "fc2_out", 3, 1, true);
    const ConstFfn from{in1.data(), in2.data(), ffn_shape(in1, in2)};
    const Ffn to{out1.data(), out2.data(), ffn_shape(out1, out2)};
    require_apart(out1, {&in1, &in2, &wanted, &out2});
    require_apart(out2, {&in1, &in2, &wanted});
    const py::gil_scoped_release release;
    gather(from, indices(wanted), to);
}

void bound_pack(const py::buffer& fc1, const py::buffer& fc2, const py::buffer& index,
                const py::buffer& message) {
    const Buffer in1(fc1, "fc1", 3, 1), in2(fc2, "fc2", 3, 1), leaving = integers(index, "index");
    const Buffer out(message, "message", 1, 1, true);
    const ConstFfn from{in1.data(), in2.data(), ffn_shape(in1, in2)};
    require_message(out, indices(leaving), from.shape);
    require_apart(out, {&in1, &in2, &leaving});
    const py::gil_scoped_release release;
    pack(from, indices(leaving), out.data());
}

void bound_unpack(const py::buffer& message, const py::buffer& index, const py::buffer& fc1,
                  const py::buffer& fc2) {
    const Buffer in(message, "message", 1, 1), arriving = integers(index, "index");
    const Buffer out1(fc1, "fc1", 3, 1, true), out2(fc2, "fc2", 3, 1, true);
    const Ffn to{out1.data(), out2.data(), ffn_shape(out1, out2)};
    require_message(in, indices(arriving), to.shape);
    require_apart(out1, {&in, &arriving, &out2});
    require_apart(out2, {&in, &arriving});
    const py::gil_scoped_release release;
    unpack(in.data(), indices(arriving), to);
}

}  // namespace
}  // namespace megatron_idea

PYBIND11_MODULE(_C, m) {
    using namespace megatron_idea;
    m.doc() = "Where neurons go and how they are copied: csrc/plan.h, csrc/move.h.";
    m.def("relocate", &bound_relocate, py::arg("ids"), py::arg("keep"), py::arg("ordered"),
          py::arg("sources"), "Fill sources [survivors, 2] with (rank, local index).");
    m.def("gather", &bound_gather, py::arg("fc1"), py::arg("fc2"), py::arg("index"),
          py::arg("fc1_out"), py::arg("fc2_out"), "out[j] = in[index[j]], all as bytes.");
    m.def("pack", &bound_pack, py::arg("fc1"), py::arg("fc2"), py::arg("index"),
          py::arg("message"), "message[j] = in[index[j]], all as bytes.");
    m.def("unpack", &bound_unpack, py::arg("message"), py::arg("index"), py::arg("fc1"),
          py::arg("fc2"), "out[index[j]] = message[j], all as bytes.");
}
