// Random layers: survivors placed once, evenly, with as few moves as the counts demand.
#include "../relocate.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "check.h"

using namespace megatron_idea;

namespace {

// Ranks with any number of units, 0 included; the number of survivors can be shared.
std::vector<RankUnits> random_layer(Random& random) {
    const std::int64_t tp = random.between(1, 8);
    std::vector<RankUnits> ranks;
    std::vector<std::pair<std::size_t, std::size_t>> places;
    for (std::int64_t r = 0; r < tp; ++r) {
        const std::int64_t units = random.between(r == 0 ? tp : 0, 40);
        ranks.push_back({std::vector<std::int64_t>(units), std::vector<std::uint8_t>(units)});
        for (std::int64_t i = 0; i < units; ++i) places.emplace_back(r, i);
    }
    std::vector<std::int64_t> ids(places.size());
    std::iota(ids.begin(), ids.end(), random.between(-5, 5));
    std::shuffle(ids.begin(), ids.end(), random.engine());
    for (std::size_t k = 0; k < places.size(); ++k)
        ranks[places[k].first].ids[places[k].second] = ids[k];
    std::shuffle(places.begin(), places.end(), random.engine());
    const std::int64_t share = random.between(1, places.size() / tp);
    for (std::int64_t k = 0; k < share * tp; ++k)
        ranks[places[k].first].keep[places[k].second] = 1;
    return ranks;
}

void check_layer(const std::vector<RankUnits>& ranks) {
    std::vector<std::int64_t> survivors, counts;
    for (const RankUnits& rank : ranks) {
        counts.push_back(0);
        for (std::size_t i = 0; i < rank.ids.size(); ++i)
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

// Whatever the lists say, nothing outside of them is touched.
void check_layers_that_no_caller_should_bring() {
    for (const Placement placement : {Placement::min, Placement::ordered}) {
        CHECK(relocate({{{3, 1, 3}, {1, 1, 1}}}, placement).size() == 3);
        CHECK(relocate({{{3, 1, 2}, {0, 0, 0}}, {{}, {}}}, placement).empty());
        relocate({{{3, 1, 2}, {1, 1, 1}}, {{}, {}}}, placement);
    }
}

}  // namespace

int main() {
    Random random(1);
    for (int round = 0; round < 2000; ++round) check_layer(random_layer(random));
    check_layers_that_no_caller_should_bring();
}
