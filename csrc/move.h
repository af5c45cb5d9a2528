// Copies units between tensors and messages, bit for bit, whatever the element type.
//
// A tensor is bytes [outer, units, slice]: unit u owns the slices [:, u]. In a message a unit is one
// piece [outer, slice]. Buffers have exactly these sizes and do not overlap; every index is below
// the units of the tensor that it points into: the caller makes sure of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace megatron_idea {

struct Layout {
    std::int64_t outer;
    std::int64_t units;
    std::int64_t slice;  // bytes
};

// 32 bits: the loops read half as much.
using Index = std::vector<std::uint32_t>;

// to[:, j] = from[:, index[j]] for all of `to` [outer, index.size(), slice].
void gather(const std::byte* from, const Layout& layout, const Index& index, std::byte* to);

// message[j] = from[:, index[j]].
void pack(const std::byte* from, const Layout& layout, const Index& index, std::byte* message);

// to[:, index[j]] = message[j].
void unpack(const std::byte* message, const Index& index, std::byte* to, const Layout& layout);

}  // namespace megatron_idea
