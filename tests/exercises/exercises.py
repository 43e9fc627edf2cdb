"""Eight functions to write, each of which carries an idea of DA-VAE. README.md here says how to work.

Shapes: B pictures, C base channels, D detail channels (a multiple of C), h x w the latent's grid.
"""

def project(z_d, C):
    """Proj, Eq. (4): what of the D detail channels is compared with the C base channels.

    Alignment wants z_d to be close to z, but z_d may have more channels. Proj has no parameters (one that
    learned could do the aligning itself, and leave z_d as it is): with r = D / C, channel i of the result is
    the mean of the r *consecutive* detail channels i r, i r + 1, ..., i r + r - 1. For D = C that is z_d.

    z_d      (B, D, h, w)   detail latent
    C                       the base's channels, a divisor of D
    returns  (B, C, h, w)

    Used by align_loss, and by stage 1's table (align.py).
    """
    raise NotImplementedError

def align_loss(z_d, z):
    """Detail alignment, Eq. (3): the mean over all elements of (Proj(z_d) - z)^2.

    The pretrained transformer meets z_d for the first time in stage 2, and finds there what it knows: this
    loss saw to that. z is the target, so no gradient may flow to it. It comes from a frozen encoder today;
    the loss should not depend on that. The scale of z_d matters as much as its pattern: normalise neither.
    Write project first, and use it here.

    z_d      (B, D, h, w)   detail latent, trained
    z        (B, C, h, w)   base latent, the target
    returns  a scalar

    Used by objective, times lambda_align, Eq. (6) (align.py).
    """
    raise NotImplementedError

def omega(n, n_warm):
    """The weight of the detail loss at step n of stage 2, Eq. (12).

    At step 0 the detail output is 0 and its loss is large: at full weight it would pull at the pretrained
    weights before the new layers know anything. So its weight grows from 0 to 1 along half a period of a
    cosine, omega(n) = (1 - cos(pi n / n_warm)) / 2 for n < n_warm, and stays 1 from then on.

    n        the step, 0, 1, 2, ...
    n_warm   steps of the warm-up, at least 1
    returns  a number from 0 to 1

    Used by the loop of main (finetune_dit.py), and of train (imagenet_eval.py).
    """
    raise NotImplementedError

def flow_loss(u_hat, u, C, w):
    """The loss of stage 2, Eq. (13): (||u_hat - u||^2 + w ||u_hat_d - u_d||^2) / (|B| + w |R|).

    The squares are *sums*: the first over the base elements (channels 0 ... C - 1 of the whole batch, |B| of
    them), the second over the detail elements (all other channels, |R| of them). Together that is a weighted
    mean of all squared errors, in which a detail element counts w times: while w grows from 0 to 1, the
    loss keeps its scale, and so one learning rate fits throughout.

    u_hat    (B, C + D, h, w)   predicted velocity, base channels first
    u        (B, C + D, h, w)   true velocity, noise - z
    C                           how many channels are the base's
    w                           omega(n)
    returns  a scalar

    Used by the loop of main (finetune_dit.py), and by transport_loss (imagenet_eval.py).
    """
    raise NotImplementedError

def interleave(base, detail, patch):
    """Fuse the rows of the two output layers into one, for the export.

    The pretrained head (final_layer.linear) gives p p C numbers a token, the new one (O') p p D: for each of
    the p p positions of a patch in turn, all its channels. A program that knows nothing of DA-VAE reads one
    head of C + D channels: for each position in turn, first its C base channels, then its D detail channels.
    Nothing is computed here: rows move, whole.

    base     (p p C, ...)         rows of final_layer.linear: of its weight (..., d), or of its bias
    detail   (p p D, ...)         rows of O'
    patch                         p
    returns  (p p (C + D), ...)

    The same rule is in fuse_details, which export calls (sample.py, finetune_dit.py).
    """
    raise NotImplementedError

def flow_step(x, u, t, t_next):
    """One step of Euler's method along the flow.

    Training mixes data and noise in a straight line, x_t = (1 - t) z + t noise, with t from 0 (data) to
    1 (noise). The velocity along it, dx/dt, is u = noise - z, and that is what the transformer predicts.
    Sampling begins at t = 1 and follows u down to t = 0. The steps are not of equal length (the timestep
    shift makes those near the noise shorter), so both ends of each are given.

    x        (B, C + D, h, w)   the latent at t
    u        like x             its velocity
    t        where it is
    t_next   where to go: below t in sampling, but nothing here needs to know
    returns  like x, the latent at t_next

    A line of the loop of generate (sample.py), and of euler_sample (imagenet_eval.py; there noise is at 0).
    """
    raise NotImplementedError

def guidance(u, cfg):
    """Classifier-free guidance: go further in the direction in which the prompt leads.

    The transformer has answered twice for each picture, in one batch: first for all the prompts, then, in
    the same order, for their negatives (most often the empty prompt). Guidance starts at the negative's
    velocity and goes cfg times the way from there to the prompt's: cfg = 0 is the negative's, 1 the prompt's
    own, above 1 beyond it.

    u        (2 B, C + D, h, w)   velocities of [prompts; negatives]
    cfg      the guidance scale
    returns  (B, C + D, h, w)

    A line of the loop of generate (sample.py).
    """
    raise NotImplementedError

def frechet_distance(mu1, s1, mu2, s2):
    """The distance of two Gaussians that makes FID: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Real and generated pictures become features of a network; each set is described by its mean and its
    covariance. The root is a *matrix* root: R with R R = S1 S2. Only its trace is needed, the sum of the
    roots of the eigenvalues of S1 S2; those are real and not negative, but rounding may take a zero below
    zero, and with fewer pictures than features there are many zeros.

    mu1, mu2   (d,)     means, numpy float64
    s1, s2     (d, d)   covariances, symmetric, perhaps singular
    returns    a number, not squared-rooted again

    Used by fid, recon and ablate (imagenet_eval.py); no equation of the paper: Heusel et al. 2017.
    """
    raise NotImplementedError
