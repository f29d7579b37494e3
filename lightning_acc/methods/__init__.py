"""How it works: the training step as a function of the samples' weights, and four ways to ask it what a sample did.

A training is a sequence of steps. Step t takes a state ``s_t``, the parameters ``theta_t`` and what the optimizer remembers, to
the next one. It sees a batch, in which occurrence i has the loss weight ``w_i`` (1 over the size of the batch, of a mean):

    s_{t+1} = F_t(s_t, w) = U_t(s_t, G_t(theta_t, w)),        G_t(theta, w) = sum_i  w_i  grad loss_i(theta).

``G_t`` is the gradient of the batch. ``U_t`` is all that happens to it: clipping, weight decay, momentum, the optimizer's rule.
To train *without* the samples R is to take the same steps at weights ``w^R``, where theirs are 0 and no other has changed: the
same initial parameters, the same batches, the same random numbers, the same denominators. What that shifts the state by is
``D_t = s^R_t - s_t``, with ``D_0 = 0``, and the score is what it shifts a query by (``lightning_acc.core.queries``):

    score(R) = query(theta_T + D_T) - query(theta_T).        Positive: the samples help. Negative: they harm.

The methods differ in how they come by ``D``, or by the score itself.

**loo**, the truth, takes the steps once more. Nothing is left out, and it costs a training for each R:

    s_{t+1} + D_{t+1} = F_t(s_t + D_t, w^R).

**acc-sgd-ie** (arXiv 2510.26185) takes them too, but with a straight line in place of the gradient: that of the batch without
the samples, at the parameters of the recorded run. The update is evaluated as it is:

    s_{t+1} + D_{t+1} = U_t(s_t + D_t,  G_t(theta_t, w^R) + H_t(w^R) D_t),        H_t(w) = dG_t / dtheta (theta_t, w).

Of a linear model with the squared loss the gradient *is* a line, and this is the truth. ``H_t D_t`` is a product of the Hessian
with a vector, which costs about a gradient: so it costs about what ``loo`` does. It is worth that where ``loo`` cannot be
batched, and as what the cheaper ones are built on. Under plain SGD the line reads
``D_{t+1} = (I - lr H_t(w^R)) D_t + lr sum_{i in R} w_i g_i``, the paper's own, with ``g_i`` the gradient of a sample's loss.

**sgd-ie** (Hara, Nitanda and Maehara 2019, arXiv 1906.08473) linearises the whole step, at the weights *with* the samples:

    D_{t+1} = dF_t/ds D_t  +  dF_t/dw (w^R - w).

This is linear in R. So the steps can be walked backwards once, for all samples at a time: with ``lambda_T = grad query``,

    lambda_t = (dF_t/ds)^T lambda_{t+1},        score(i) = - sum over its visits t of  w_i <g_i, (dU_t/dG)^T lambda_{t+1}>.

``lambda_t`` says how much the query would change if the state at step t did. One walk costs about three trainings for all
samples, and the scores of a group are the sums of those of its members: which the truth is not.
``tracin`` is the same with ``lambda_t = grad query`` throughout.

**acc-low-rank** adds to that one walk what distinguishes the two lines above, where it is felt, at the price of a few trainings
for all samples. Against the propagator of the whole batch, which all removals share, ACC-SGD-IE is SGD-IE with each sample's
gradient taken where the run *without it* would stand,

    score(i) = - sum over its visits t of  w_i <g_i + H_i D^i_t, gamma_t>,        gamma_t = (dU_t/dG)^T lambda_{t+1},

and a shift that enters there may be rough: followed in the directions in which training contracts most, or exactly for the
few samples that matter most (``lightning_acc.methods.low_rank.tracked``, ``lightning_acc.methods.low_rank.screened``). Where
the optimizer itself is no straight line, as Adam, or with clipping, it is that which is followed
(``lightning_acc.methods.low_rank.defect``). What bends along a shift that nobody has followed is the query: adjoints that
start from a few random directions of its curvature (``lightning_acc.core.queries.curvature``) go back beside its own.

``H_t`` is what autograd makes of ``G_t``. Where a loss stops gradients (``detach``), or passes on others than its function has
(a straight-through estimator, a reversed gradient), that leaves out how what was stopped depends on the parameters: ``loo``
sees it, and so does the verdict; the estimates do not.

What no straight line sees, and what then becomes of the scores, is shown in ``scripts/guide/what-can-go-wrong.md``.

Here is a small class for each method (``lightning_acc.methods.rules``), a registry that says how each runs, and the sweeps that
take them through a run.
"""
