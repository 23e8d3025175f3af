// orpo_kernels::softmax_compact_online_: one tile of an online softmax to the entries that are
// kept, redone from the inputs, and the column sums of the others; or, where too many would be
// kept, to what softmax_collect_ makes of it.
//
// 64 rows are one task and add what they drop to sums of their own, put together in order: the
// result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include "collector.h"

namespace {

using namespace orpo;

constexpr int64_t kRows = 64;

// sums <- sums + factor * x; the sum of x. Elements of a 16-bit tile change no lanes: of the n / 2
// words the low halves have the first sums, the high ones the next, an odd last one the last.
template <class T, class R>
ORPO_CLONES R add_scaled(const T* x, int64_t n, R factor, R* sums) {
    R total = 0;
    if constexpr (sizeof(T) == 2) {
        const int64_t half = n / 2;
        R *low_sums = sums, *high_sums = sums + half;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < half; ++i) {
            const uint32_t word = load_pair(x + 2 * i);
            const R low = widen<T, false>(word), high = widen<T, true>(word);
            low_sums[i] += factor * low;
            high_sums[i] += factor * high;
            total += low + high;
        }
        if (n % 2) {
            const R last = widen_one(x[n - 1]);
            sums[n - 1] += factor * last;
            total += last;
        }
    } else {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; ++i) {
            sums[i] += factor * x[i];
            total += x[i];
        }
    }
    return total;
}

// out <- out + sums, these in the order of add_scaled.
template <class T, class R>
ORPO_CLONES void add_in_order(const R* sums, int64_t n, R* out) {
    if constexpr (sizeof(T) == 2) {
        const int64_t half = n / 2;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            out[2 * i] += sums[i];
            out[2 * i + 1] += sums[half + i];
        }
        if (n % 2) out[n - 1] += sums[n - 1];
    } else {
        add(sums, n, out);
    }
}

template <class R>
struct Task {
    Collected<R> collected;
    std::vector<Look<R>> looks;
    std::vector<R> tail;  // (G, C), by chunks in the order of add_scaled
    bool full = false;
};

template <class T>
struct Compactor {
    using R = Real<T>;

    const Collector<T>& collector;
    R eps, share;  // kept and, where they are too many, large are entries over these shares
    int64_t most, capacity;
    const int64_t* groups;
    int64_t group_count;
    R* dropped;

    void look_at(int64_t begin, int64_t end, Task<R>* task) const {
        const int64_t columns = collector.tile.columns;
        std::vector<Entry<R>>& entries = task->collected.entries;
        task->tail.assign(group_count * columns, R(0));
        for (int64_t r = begin; r < end; ++r) {
            const size_t first = entries.size();
            const R part = task->full ? share : eps;
            task->looks.push_back(collector.look(r, part, &entries));
            const R known = task->looks.back().known;
            choose(part * known, task->full ? most : columns, first, &entries);
            collector.take_out(r, first, entries);
            task->collected.counts.push_back(static_cast<int64_t>(entries.size() - first));
            const auto count = static_cast<int64_t>(entries.size());
            if (!task->full && count > capacity * (end - begin)) {
                task->full = true;
                give_back(begin, task);
            }
        }
        if (!task->full) add_tails(begin, task);
    }

    // Of the rows looked at so far only the large entries stay in the list.
    void give_back(int64_t begin, Task<R>* task) const {
        Collected<R>& lists = task->collected;
        std::vector<Entry<R>> before;
        std::swap(before, lists.entries);
        auto next = before.begin();
        for (size_t i = 0; i < lists.counts.size(); ++i) {
            const auto row = begin + static_cast<int64_t>(i);
            const size_t first = lists.entries.size();
            T* x = collector.tile.template row<T>(row);
            const auto end = next + static_cast<std::ptrdiff_t>(lists.counts[i]);
            for (; next != end; ++next) {
                x[next->column] = narrow_one<T>(next->value);
                lists.entries.push_back(*next);
            }
            choose(share * task->looks[i].known, most, first, &lists.entries);
            collector.take_out(row, first, lists.entries);
            lists.counts[i] = static_cast<int64_t>(lists.entries.size() - first);
        }
    }

    void finish(int64_t begin, Task<R>* task) const {
        size_t first = 0;
        for (size_t i = 0; i < task->looks.size(); ++i) {
            const size_t last = first + static_cast<size_t>(task->collected.counts[i]);
            const auto row = begin + static_cast<int64_t>(i);
            collector.finish(row, task->looks[i], first, last, &task->collected);
            first = last;
        }
    }

  private:
    // By column first: the sums stay in the first-level cache, the rows in the second.
    void add_tails(int64_t begin, Task<R>* task) const {
        const int64_t columns = collector.tile.columns;
        for (int64_t first = 0; first < columns; first += kChunk) {
            const int64_t n = std::min(kChunk, columns - first);
            for (size_t i = 0; i < task->looks.size(); ++i) {
                const auto r = begin + static_cast<int64_t>(i);
                const R known = task->looks[i].known;
                // A row of no group adds nothing.
                const bool counts = groups[r] >= 0 && groups[r] < group_count && known > R(0);
                R* sums = task->tail.data() + (counts ? groups[r] : 0) * columns + first;
                const T* x = collector.tile.template row<const T>(r) + first;
                const R sum = add_scaled(x, n, counts ? R(1) / known : R(0), sums);
                dropped[r] = first == 0 ? sum : dropped[r] + sum;
            }
        }
    }
};

template <class T, class R>
void add_tasks(const std::vector<Task<R>>& tasks, const Matrix& tail) {
    const int64_t chunks = (tail.columns + kChunk - 1) / kChunk;
    over_rows(tail.rows * chunks, kChunk * static_cast<int64_t>(tasks.size()), [&](int64_t i) {
        const int64_t group = i / chunks, first = i % chunks * kChunk;
        const int64_t n = std::min(kChunk, tail.columns - first);
        for (const auto& task : tasks) {
            add_in_order<T>(task.tail.data() + group * tail.columns + first, n,
                            tail.row<R>(group) + first);
        }
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_compact_online_(
    const Tensor& logits, std::optional<Tensor> bias, const Tensor& labels, int64_t first_column,
    const Tensor& row_max, const Tensor& sum_exp, std::optional<Tensor> others,
    std::optional<Tensor> hidden, std::optional<Tensor> weight, double eps, double share,
    int64_t most, double logit_scale, std::optional<double> softcap, const Tensor& groups,
    const Tensor& tail_tensor, int64_t capacity) {
    const Matrix tile = matrix(logits, "logits"), tail = matrix(tail_tensor, "tail");
    STD_TORCH_CHECK(tail.dtype == accumulation_dtype(tile.dtype), "tail must be ",
                    torch::headeronly::toString(accumulation_dtype(tile.dtype)));
    STD_TORCH_CHECK(tail.columns == tile.columns && (tail.rows == 1 || tail.rows == 2),
                    "tail must be (G, C) = (1 or 2, ", tile.columns, "), got (", tail.rows, ", ",
                    tail.columns, ")");
    STD_TORCH_CHECK(groups.scalar_type() == ScalarType::Long, "groups must be int64");
    Tensor rescale = torch::stable::new_empty(row_max, {tile.rows});
    Tensor dropped = torch::stable::new_empty(row_max, {tile.rows});
    std::tuple<Tensor, Tensor, Tensor> lists{rescale, rescale, rescale};
    dispatch(tile.dtype, "logits", [&](auto element) {
        using T = decltype(element);
        using R = Real<T>;
        const auto collector =
            collector_of<T>(tile, bias, labels, first_column, row_max, sum_exp, others, hidden,
                            weight, logit_scale, softcap, true, true, rescale);
        const Compactor<T> compactor{collector,
                                     static_cast<R>(eps),
                                     static_cast<R>(share),
                                     most,
                                     capacity,
                                     per_row<int64_t>(groups, tile.rows, "groups"),
                                     tail.rows,
                                     dropped.mutable_data_ptr<R>()};
        std::vector<Task<R>> tasks((tile.rows + kRows - 1) / kRows);
        const auto for_each_task = [&](const auto& f) {
            const auto count = static_cast<int64_t>(tasks.size());
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) f(i * kRows, &tasks[i]);
            });
        };
        for_each_task([&](int64_t first, Task<R>* task) {
            compactor.look_at(first, std::min(first + kRows, tile.rows), task);
        });
        const bool dense =
            std::any_of(tasks.begin(), tasks.end(), [](const auto& task) { return task.full; });
        for_each_task([&](int64_t first, Task<R>* task) {
            if (dense && !task->full) compactor.give_back(first, task);
            compactor.finish(first, task);
        });
        if (dense) {
            dropped = torch::stable::new_empty(row_max, {0});
        } else {
            add_tasks<T>(tasks, tail);
        }
        std::vector<Collected<R>> collected;
        for (auto& task : tasks) collected.push_back(std::move(task.collected));
        lists = joined(collected, row_max, tile.rows);
    });
    return std::tuple_cat(std::make_tuple(rescale), lists, std::make_tuple(dropped));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orpo_kernels, CPU, m) {
    m.impl("softmax_compact_online_", TORCH_BOX(&softmax_compact_online_));
}
