"""The sparse strategy: the probabilities over eps as they are, the others by their average.

    u_tv = E_tv e^m / e^lse          the entry of the softmax gradient; E, m as in the exact loop
    K_t  contains every v with u_tv > eps;  k_tv = u_tv as the backend rounds it
    m_t  = sum_v u_tv - sum_{K_t} k_tv                       the mass that is dropped
    q_g  = the dropped u_tv, summed over the rows of group g and normalised
    dhidden_t = a_t (share W[y] - sum_{K_t} k_tv W_v - m_t q_g W)
    dW_v = sum_t (a_t share 1[v = y_t] - a_t k_tv) h_t - sum_g q_gv sum_{t in g} a_t m_t h_t

One pass over the logits and no second GEMM. What is dropped is given back, so that the gradient's
error sums to 0 over the rows of a group: groups are rows whose a_t share a sign. u <= eps where
dropped, hence the root of the sum of dropped u^2 is at most sqrt(eps m_t): the certificate.

K_t is chosen by the sum that is known so far (the label's exponential in it from the start), which
is at most the final one: a superset. Between forward and backward of a trainable head the kept
entries stay in a store of fixed size. The backward recomputes, the exact way, what is not in it.

    plan.py              how the budget is divided
    tail.py              what is dropped, and the certificate of it
    tile_loop.py         the forward where one operation finishes a tile: kept entries are lists
    scan_loop.py         the forward of a GPU: one look, kept entries are slots
    weight_gradient.py   dW from lists, block by block
    slot_gradient.py     dW from a GPU's slots
"""
