#include "relocate.h"

#include <algorithm>

namespace megatron_idea {
namespace {

using Sources = std::vector<Source>;

std::vector<Sources> survivors_by_rank(const std::vector<RankUnits>& ranks) {
    std::vector<Sources> kept(ranks.size());
    for (std::size_t r = 0; r < ranks.size(); ++r)
        for (std::size_t i = 0; i < ranks[r].keep.size(); ++i)
            if (ranks[r].keep[i])
                kept[r].push_back({static_cast<std::int64_t>(r), static_cast<std::int64_t>(i)});
    return kept;
}

Sources sorted_by_id(const std::vector<RankUnits>& ranks, const std::vector<Sources>& kept) {
    Sources placed;
    for (const Sources& of_rank : kept) placed.insert(placed.end(), of_rank.begin(), of_rank.end());
    const auto id = [&](const Source& source) { return ranks[source.rank].ids[source.index]; };
    std::sort(placed.begin(), placed.end(),
              [&](const Source& a, const Source& b) { return id(a) < id(b); });
    return placed;
}

Sources with_fewest_moves(const std::vector<Sources>& kept) {
    std::size_t total = 0;
    for (const Sources& of_rank : kept) total += of_rank.size();
    const std::size_t share = total / kept.size();
    Sources placed, surplus;
    for (const Sources& of_rank : kept)
        if (of_rank.size() > share)
            surplus.insert(surplus.end(), of_rank.begin() + share, of_rank.end());
    auto next = surplus.begin();
    for (const Sources& of_rank : kept) {
        const std::size_t stay = std::min(of_rank.size(), share);
        placed.insert(placed.end(), of_rank.begin(), of_rank.begin() + stay);
        placed.insert(placed.end(), next, next + (share - stay));
        next += share - stay;
    }
    return placed;
}

}  // namespace

std::vector<Source> relocate(const std::vector<RankUnits>& ranks, Placement placement) {
    const auto kept = survivors_by_rank(ranks);
    return placement == Placement::ordered ? sorted_by_id(ranks, kept) : with_fewest_moves(kept);
}

}  // namespace megatron_idea
