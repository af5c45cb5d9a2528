// Random layers: survivors placed once, evenly, with as few moves as the counts demand.
#include "../plan.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "check.h"

using namespace megatron_idea;

namespace {

struct Layer {
    std::vector<std::vector<std::int64_t>> ids;
    std::vector<std::vector<std::uint8_t>> keep;

    std::vector<RankNeurons> ranks() const {
        std::vector<RankNeurons> result;
        for (std::size_t r = 0; r < ids.size(); ++r) {
            const auto count = static_cast<std::int64_t>(ids[r].size());
            result.push_back({ids[r].data(), keep[r].data(), count});
        }
        return result;
    }
};

// Ranks of any widths, 0 included; the number of survivors can be shared.
Layer random_layer(Random& random) {
    const std::int64_t tp = random.between(1, 8);
    Layer layer;
    std::vector<std::pair<std::size_t, std::size_t>> places;
    for (std::int64_t r = 0; r < tp; ++r) {
        const std::int64_t width = random.between(r == 0 ? tp : 0, 40);
        layer.ids.emplace_back(width);
        layer.keep.emplace_back(width, std::uint8_t{0});
        for (std::int64_t i = 0; i < width; ++i) places.emplace_back(r, i);
    }
    std::vector<std::int64_t> ids(places.size());
    std::iota(ids.begin(), ids.end(), random.between(-5, 5));
    std::shuffle(ids.begin(), ids.end(), random.engine());
    for (std::size_t k = 0; k < places.size(); ++k)
        layer.ids[places[k].first][places[k].second] = ids[k];
    std::shuffle(places.begin(), places.end(), random.engine());
    const std::int64_t share = random.between(1, places.size() / tp);
    for (std::int64_t k = 0; k < share * tp; ++k)
        layer.keep[places[k].first][places[k].second] = 1;
    return layer;
}

void check_layer(const Layer& layer) {
    const auto ranks = layer.ranks();
    std::vector<std::int64_t> survivors, counts;
    for (const RankNeurons& rank : ranks) {
        counts.push_back(0);
        for (std::int64_t i = 0; i < rank.count; ++i)
            if (rank.keep[i]) {
                survivors.push_back(rank.ids[i]);
                ++counts.back();
            }
    }
    std::sort(survivors.begin(), survivors.end());
    const std::int64_t share = survivors.size() / ranks.size();
    for (const Placement placement : {Placement::min, Placement::ordered}) {
        const auto placed = relocate(ranks, placement);
        std::vector<std::int64_t> ids;
        std::int64_t moved = 0, least = 0;
        for (std::size_t k = 0; k < placed.size(); ++k) {
            ids.push_back(ranks[placed[k].rank].ids[placed[k].index]);
            moved += placed[k].rank != static_cast<std::int64_t>(k) / share;
        }
        if (placement == Placement::ordered) {
            CHECK(ids == survivors);
            continue;
        }
        for (const std::int64_t count : counts) least += std::max<std::int64_t>(0, count - share);
        CHECK(moved == least);
        std::sort(ids.begin(), ids.end());
        CHECK(ids == survivors);
    }
}

}  // namespace

int main() {
    Random random(1);
    for (int round = 0; round < 2000; ++round) check_layer(random_layer(random));

    const std::int64_t ids[] = {3, 1, 2}, twice[] = {3, 1, 3};
    const std::uint8_t all[] = {1, 1, 1}, none[] = {0, 0, 0};
    CHECK(refuses([&] { relocate({{ids, none, 3}}, Placement::min); }));
    CHECK(refuses([&] { relocate({{twice, all, 3}}, Placement::min); }));
    CHECK(refuses([&] { relocate({{ids, all, 3}, {ids, all, 0}}, Placement::ordered); }));
    CHECK(refuses([&] { relocate({}, Placement::min); }));
}
