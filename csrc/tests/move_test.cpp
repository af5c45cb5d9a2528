// Random bits moved by gather, pack and unpack, against the definition of what a neuron owns.
#include "../move.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"

using namespace megatron_idea;

namespace {

// Vectors of exact size: the sanitizer sees every byte outside of them.
struct Tensors {
    FfnShape shape;
    std::vector<std::byte> fc1, fc2;

    explicit Tensors(FfnShape s)
        : shape(s), fc1(s.states * 2 * s.neurons * s.hidden * s.element_bytes),
          fc2(s.states * s.hidden * s.neurons * s.element_bytes) {}

    ConstFfn source() const { return {fc1.data(), fc2.data(), shape}; }
    Ffn target() { return {fc1.data(), fc2.data(), shape}; }

    // All that a neuron owns, byte by byte.
    std::vector<std::byte> neuron(std::int64_t c) const {
        std::vector<std::byte> all;
        const auto& [states, neurons, hidden, e] = shape;
        for (std::int64_t s = 0; s < states; ++s)
            for (int part = 0; part < 3; ++part)
                for (std::int64_t h = 0; h < hidden; ++h) {
                    const std::int64_t row = ((s * 2 + part) * neurons + c) * hidden + h;
                    const std::int64_t column = (s * hidden + h) * neurons + c;
                    const std::byte* element = part < 2 ? &fc1[row * e] : &fc2[column * e];
                    all.insert(all.end(), element, element + e);
                }
        return all;
    }
};

void fill(std::vector<std::byte>& bytes, Random& random) {
    for (std::byte& b : bytes) b = static_cast<std::byte>(random.between(0, 255));
}

void check_moves(Random& random) {
    const FfnShape shape{random.between(1, 4), random.between(1, 40), random.between(1, 40),
                         std::int64_t{1} << random.between(0, 3)};
    Tensors from(shape);
    fill(from.fc1, random);
    fill(from.fc2, random);

    std::vector<std::int64_t> index(random.between(1, 50));
    for (auto& i : index) i = random.between(0, shape.neurons - 1);
    const Indices wanted{index.data(), static_cast<std::int64_t>(index.size())};
    Tensors gathered({shape.states, wanted.count, shape.hidden, shape.element_bytes});
    gather(from.source(), wanted, gathered.target());
    std::vector<std::byte> message(wanted.count * shape.neuron_bytes());
    pack(from.source(), wanted, message.data());
    for (std::int64_t j = 0; j < wanted.count; ++j) {
        const auto owned = from.neuron(index[j]);
        CHECK(gathered.neuron(j) == owned);
        CHECK(std::equal(owned.begin(), owned.end(), message.begin() + j * shape.neuron_bytes()));
    }

    // Back to other places; what is not named stays.
    Tensors to({shape.states, wanted.count + 5, shape.hidden, shape.element_bytes});
    fill(to.fc1, random);
    fill(to.fc2, random);
    const Tensors before = to;
    std::vector<std::int64_t> places(wanted.count + 5);
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random.engine());
    unpack(message.data(), {places.data(), wanted.count}, to.target());
    for (std::int64_t j = 0; j < wanted.count + 5; ++j)
        CHECK(to.neuron(places[j]) ==
              (j < wanted.count ? from.neuron(index[j]) : before.neuron(places[j])));
}

void check_refusals() {
    Tensors from({2, 3, 5, 4}), to({2, 1, 5, 4}), odd({2, 3, 5, 3});
    std::vector<std::byte> message(from.shape.neuron_bytes());
    const auto limits = std::numeric_limits<std::int64_t>();
    for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{3}, limits.min(), limits.max()}) {
        const Indices index{&bad, 1};
        CHECK(refuses([&] { gather(from.source(), index, to.target()); }));
        CHECK(refuses([&] { pack(from.source(), index, message.data()); }));
        CHECK(refuses([&] { unpack(message.data(), index, from.target()); }));
    }
    const std::int64_t both[] = {0, 1};
    CHECK(refuses([&] { gather(from.source(), {both, 2}, to.target()); }));
    CHECK(refuses([&] { pack(odd.source(), {both, 1}, message.data()); }));
}

}  // namespace

int main() {
    Random random(2);
    for (int round = 0; round < 200; ++round) check_moves(random);
    check_refusals();
}
