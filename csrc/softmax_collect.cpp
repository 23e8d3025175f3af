// orpo_kernels::softmax_collect_: one tile of an online softmax, its large entries taken out and
// redone from the inputs.
//
// A row belongs to one thread and lists are put together in the order of the rows, so the result
// does not depend on their number.
#include <torch/csrc/stable/library.h>

#include "collector.h"

namespace {

using namespace orpo;

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_collect_(
    const Tensor& logits, std::optional<Tensor> bias, const Tensor& labels, int64_t first_column,
    const Tensor& row_max, const Tensor& sum_exp, std::optional<Tensor> others,
    std::optional<Tensor> hidden, std::optional<Tensor> weight, double share, int64_t most,
    double logit_scale, std::optional<double> softcap, bool online, bool store) {
    const Matrix tile = matrix(logits, "logits");
    Tensor rescale = torch::stable::new_empty(row_max, {tile.rows});
    std::tuple<Tensor, Tensor, Tensor> lists{rescale, rescale, rescale};
    dispatch(tile.dtype, "logits", [&](auto element) {
        using T = decltype(element);
        using R = Real<T>;
        const auto collector =
            collector_of<T>(tile, bias, labels, first_column, row_max, sum_exp, others, hidden,
                            weight, logit_scale, softcap, online, store, rescale);
        const R part = static_cast<R>(share);
        std::vector<Collected<R>> tasks(tile.rows);  // each at its first row
        const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, tile.columns));
        torch::stable::parallel_for(0, tile.rows, grain, [&](int64_t begin, int64_t end) {
            Collected<R>& task = tasks[begin];
            for (int64_t r = begin; r < end; ++r) {
                const size_t first = task.entries.size();
                const Look<R> look = collector.look(r, part, &task.entries);
                choose(part * look.known, most, first, &task.entries);
                if (store) collector.take_out(r, first, task.entries);
                collector.finish(r, look, first, task.entries.size(), &task);
                task.counts.push_back(static_cast<int64_t>(task.entries.size() - first));
            }
        });
        lists = joined(tasks, row_max, tile.rows);
    });
    return std::tuple_cat(std::make_tuple(rescale), lists);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(orpo_kernels, CPU, m) {
    m.impl("softmax_collect_", TORCH_BOX(&softmax_collect_));
}
