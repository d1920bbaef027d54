def indexer_topk_cpu(q, k, weights, topk, budget, visibility, k_scale, sorted, mark_hidden):
    from . import reference
    return reference.indexer_topk(q, k, weights, topk, block_size=budget.block_size, block_topk=budget.block_topk, k_scale=k_scale, sorted=sorted, mark_hidden=mark_hidden, **visibility._asdict())
