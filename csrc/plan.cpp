#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_idea {
namespace {

void check_unique_ids(const std::vector<RankNeurons>& ranks) {
    std::vector<std::int64_t> ids;
    for (const RankNeurons& rank : ranks) ids.insert(ids.end(), rank.ids, rank.ids + rank.count);
    std::sort(ids.begin(), ids.end());
    const auto twice = std::adjacent_find(ids.begin(), ids.end());
    if (twice != ids.end())
        throw std::invalid_argument("neuron " + std::to_string(*twice) + " is there twice");
}

std::vector<std::vector<Source>> survivors_by_rank(const std::vector<RankNeurons>& ranks) {
    std::vector<std::vector<Source>> kept(ranks.size());
    for (std::size_t r = 0; r < ranks.size(); ++r)
        for (std::int64_t i = 0; i < ranks[r].count; ++i)
            if (ranks[r].keep[i]) kept[r].push_back({static_cast<std::int64_t>(r), i});
    return kept;
}

}  // namespace

std::vector<Source> relocate(const std::vector<RankNeurons>& ranks, Placement placement) {
    check_unique_ids(ranks);
    const auto kept = survivors_by_rank(ranks);
    std::size_t total = 0;
    for (const auto& of_rank : kept) total += of_rank.size();
    if (total == 0) throw std::invalid_argument("no neuron survives");
    if (total % ranks.size() != 0)
        throw std::invalid_argument(std::to_string(total) + " survivors cannot be split over " +
                                    std::to_string(ranks.size()) + " ranks");

    std::vector<Source> placed;
    placed.reserve(total);
    if (placement == Placement::ordered) {
        // Sorts copies: an order that changed under the sort would lead it out of bounds.
        std::vector<std::pair<std::int64_t, Source>> by_id;
        by_id.reserve(total);
        for (const auto& of_rank : kept)
            for (const Source& source : of_rank)
                by_id.emplace_back(ranks[source.rank].ids[source.index], source);
        std::sort(by_id.begin(), by_id.end(),
                  [](const auto& a, const auto& b) { return a.first < b.first; });
        for (const auto& survivor : by_id) placed.push_back(survivor.second);
        return placed;
    }

    const std::size_t share = total / ranks.size();
    std::vector<Source> surplus;
    for (const auto& of_rank : kept)
        if (of_rank.size() > share)
            surplus.insert(surplus.end(), of_rank.begin() + share, of_rank.end());
    auto next = surplus.begin();
    for (const auto& of_rank : kept) {
        const std::size_t stay = std::min(of_rank.size(), share);
        placed.insert(placed.end(), of_rank.begin(), of_rank.begin() + stay);
        placed.insert(placed.end(), next, next + (share - stay));
        next += share - stay;
    }
    return placed;
}

}  // namespace megatron_idea
