// Which units of one layer go to which tensor-parallel rank.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_idea {

// What one rank holds, in local order. `keep` has an entry for each id, 0 for units that are removed.
struct RankUnits {
    std::vector<std::int64_t> ids;
    std::vector<std::uint8_t> keep;
};

// Where a survivor is now.
struct Source {
    std::int64_t rank;
    std::int64_t index;
};

enum class Placement {
    // Survivors stay where they are, up to an equal share a rank. What is too much on one rank
    // fills the others up, both in rank order: no placement moves fewer.
    min,
    // Rank r gets the r-th part of all survivors sorted by id: the order on one rank.
    ordered,
};

// The survivors of all ranks in their new order; with S of them on R ranks, S / R are rank 0's, the
// next S / R rank 1's. The caller makes sure that R divides S and that no id is there twice.
std::vector<Source> relocate(const std::vector<RankUnits>& ranks, Placement placement);

}  // namespace megatron_idea
