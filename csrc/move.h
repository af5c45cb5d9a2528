// Copies neurons of an FFN between tensors and messages, bit for bit, whatever the element type.
//
// Neuron c owns fc1 rows c (gate) and f + c (up), and fc2 column c. In a message it is one piece:
// [states, 3, hidden], with the down column turned into a row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megatron_idea {

// Of one FFN's state on one rank: fc1 [states, 2 neurons, hidden], fc2 [states, hidden, neurons].
struct FfnShape {
    std::int64_t states;
    std::int64_t neurons;
    std::int64_t hidden;
    std::int64_t element_bytes;  // 1, 2, 4 or 8

    std::int64_t neuron_bytes() const { return states * 3 * hidden * element_bytes; }
};

struct ConstFfn {
    const std::byte* fc1;
    const std::byte* fc2;
    FfnShape shape;
};

struct Ffn {
    std::byte* fc1;
    std::byte* fc2;
    FfnShape shape;
};

struct Indices {
    const std::int64_t* data;
    std::int64_t count;
};

// All three throw std::invalid_argument for an index that is no neuron of the tensors, before they
// write. Their operands must not overlap.

// to[j] = from[index[j]] for all of `to`, which differs from `from` in its neurons only.
void gather(const ConstFfn& from, Indices index, const Ffn& to);

// message[j] = from[index[j]].
void pack(const ConstFfn& from, Indices index, std::byte* message);

// to[index[j]] = message[j].
void unpack(const std::byte* message, Indices index, const Ffn& to);

}  // namespace megatron_idea
