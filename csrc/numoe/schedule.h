// Which experts are worked on at a time, and by whom.
//
//   apart      each thread takes whole experts, so that all that belongs to one stays in its core's caches and nobody waits
//              for anybody before the rows of all of them are added up
//   together   all threads share out the columns of every product: for few experts, or very unequal ones
//
// An element is the same sum in the same order either way.
#pragma once

#include <algorithm>
#include <vector>

#include "numoe/dispatch.h"
#include "numoe/parallel.h"

namespace numoe {

// Experts [begin, end), and how many threads work on each of their products.
struct ExpertRange {
  Index begin, end;
  Index threads;
};
inline ExpertRange all_experts(const DispatchView& dispatch) { return {0, dispatch.num_experts(), num_threads()}; }

// `all` in ranges whose rows take at most so many bytes; one expert alone may need more.  They begin with experts that have
// rows.
inline std::vector<ExpertRange> cut(const ExpertRange& all, const DispatchView& dispatch, Index bytes_per_row,
                                    Index bytes) {
  const Index most_rows = std::max<Index>(1, bytes / bytes_per_row);
  std::vector<ExpertRange> ranges;
  for (Index e = all.begin; e < all.end; ++e) {
    if (dispatch.rows(e) == 0) continue;
    const bool fits = !ranges.empty() && dispatch.begin(e + 1) - dispatch.begin(ranges.back().begin) <= most_rows;
    if (fits) {
      ranges.back().end = e + 1;
    } else {
      ranges.push_back({e, e + 1, all.threads});
    }
  }
  return ranges;
}

// Experts with rows, those with most rows first: whoever takes the next one when it has time is done about when others are.
inline std::vector<Index> heaviest_first(const ExpertRange& range, const DispatchView& dispatch) {
  std::vector<Index> experts;
  for (Index e = range.begin; e < range.end; ++e) {
    if (dispatch.rows(e) > 0) experts.push_back(e);
  }
  std::stable_sort(experts.begin(), experts.end(),
                   [&](Index a, Index b) { return dispatch.rows(a) > dispatch.rows(b); });
  return experts;
}

// Whether threads that take such experts one after the other are done at about the same time.
inline bool share_out_evenly(const std::vector<Index>& experts, const DispatchView& dispatch, Index threads) {
  constexpr Index matrices = 8;  // to read those of an expert takes about as long as to multiply so many rows
  std::vector<Index> work(static_cast<std::size_t>(threads));
  Index total = 0;
  for (const Index e : experts) {
    const Index of_expert = dispatch.rows(e) + matrices;
    *std::min_element(work.begin(), work.end()) += of_expert;
    total += of_expert;
  }
  return 10 * threads * *std::max_element(work.begin(), work.end()) <= 11 * total;
}

}  // namespace numoe
