// Random bits moved by gather, pack and unpack, against the definition of what a unit owns.
#include "../move.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"

using namespace megatron_idea;

namespace {

// Bytes of exact size: the sanitizer sees every byte outside of them.
struct Tensor {
    Layout layout;
    std::vector<std::byte> bytes;

    explicit Tensor(Layout l) : layout(l), bytes(l.outer * l.units * l.slice) {}

    void fill(Random& random) {
        for (std::byte& b : bytes) b = static_cast<std::byte>(random.between(0, 255));
    }

    // All that a unit owns, byte by byte.
    std::vector<std::byte> unit(std::int64_t u) const {
        std::vector<std::byte> all;
        for (std::int64_t o = 0; o < layout.outer; ++o)
            for (std::int64_t b = 0; b < layout.slice; ++b)
                all.push_back(bytes[(o * layout.units + u) * layout.slice + b]);
        return all;
    }
};

void check_moves(Random& random, std::int64_t slice) {
    Tensor from({random.between(1, 40), random.between(1, 40), slice});
    from.fill(random);
    const std::int64_t piece = from.layout.outer * slice;

    Index index(random.between(0, 50));
    for (auto& i : index) i = random.between(0, from.layout.units - 1);
    const std::int64_t count = index.size();
    Tensor gathered({from.layout.outer, count, slice});
    gather(from.bytes.data(), from.layout, index, gathered.bytes.data());
    std::vector<std::byte> message(count * piece);
    pack(from.bytes.data(), from.layout, index, message.data());
    for (std::int64_t j = 0; j < count; ++j) {
        const auto owned = from.unit(index[j]);
        CHECK(gathered.unit(j) == owned);
        CHECK(std::equal(owned.begin(), owned.end(), message.begin() + j * piece));
    }

    // Back to other places; what is not named stays.
    Tensor to({from.layout.outer, count + 5, slice});
    to.fill(random);
    const Tensor before = to;
    Index places(count + 5);
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random.engine());
    unpack(message.data(), Index(places.begin(), places.begin() + count), to.bytes.data(),
           to.layout);
    for (std::int64_t j = 0; j < count + 5; ++j)
        CHECK(to.unit(places[j]) == (j < count ? from.unit(index[j]) : before.unit(places[j])));
}

}  // namespace

int main() {
    Random random(2);
    // One element of each width, and what no element has.
    for (const std::int64_t slice : {1, 2, 4, 8, 3, 16, 100})
        for (int round = 0; round < 40; ++round) check_moves(random, slice);
}
