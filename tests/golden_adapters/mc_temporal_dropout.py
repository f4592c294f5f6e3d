"""The official Concrete layer (over features), the fixed one, its measures, and the paper's form in float64."""

import salience as sal

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SKIPS = {
    "ctd.x", "ctd.p_logit", "ctd.u_official", "ctd.grad_out", "time.u", "td.keep", "td.x_with_zero", "met.y",
    "met.pred", "met.logvar",
}  # fmt: skip
_TIGHT = {"rtol": 1e-9, "atol": 1e-10}
TOLERANCES = dict.fromkeys(
    (
        "time.out_rescaled", "time.out_paper", "time.soft_keep", "time.grad_p_logit", "reg.neg_entropy_scaled",
        "met.picp95", "met.ece", "met.pu", "met.coverage", "met.ece_mean_abs", "met.mu_ep", "met.var_ep_ddof1",
    ),
    _TIGHT,
)  # fmt: skip
TOLERANCES["td.out"] = TOLERANCES["td.out_replace"] = {"rtol": 1e-6, "atol": 1e-6}


def _concrete(x, grad_out, u, logit, tau, eps, axis):
    logit = logit.clone().requires_grad_()
    drop = sal.concrete_drop(u, logit, tau=tau, eps=eps)
    rescaled = sal.drop_steps(x, drop, rescale=logit.sigmoid(), axis=axis)
    rescaled.backward(grad_out, retain_graph=True)
    return rescaled.detach(), sal.drop_steps(x, drop, axis=axis).detach(), drop.detach(), logit.grad


def run(tensors, parameters):
    p = parameters["parameters"]
    tau, eps = p["temperature"], p["eps"]
    x, grad_out, logit = tensors["ctd.x"], tensors["ctd.grad_out"], tensors["ctd.p_logit"]
    official, _, _, grad = _concrete(x, grad_out, tensors["ctd.u_official"], logit, tau, eps, "channel")
    wide = [value.double() for value in (x, grad_out, tensors["time.u"], logit)]
    rescaled, plain, drop, slope = _concrete(*wide, tau, eps, "time")
    gone = 1 - tensors["td.keep"].to(x.dtype)
    means, spreads, y = tensors["met.pred"].T, tensors["met.logvar"].T, tensors["met.y"]
    found = sal.summarise(means, spreads)
    std = sal.official_std(means, spreads)
    levels = [round(0.1 * step, 1) for step in range(10)] + [0.999]
    covered = sal.coverage(found.mean, std, y, levels)
    return {
        "ctd.out_official": official,
        "ctd.grad_p_logit_official": grad,
        "time.out_rescaled": rescaled,
        "time.out_paper": plain,
        "time.soft_keep": 1 - drop,
        "time.grad_p_logit": slope,
        "reg.neg_entropy_scaled": sal.concrete_penalty(logit.double(), weight=1e-5, size=x[0].numel()),
        "td.out": sal.drop_steps(x, gone),
        "td.out_replace": sal.drop_steps(tensors["td.x_with_zero"], gone, fill=-9.0, fill_zeros=True),
        "met.picp95": sal.coverage(found.mean, std, y, [0.95]),
        "met.ece": sal.calibration_error(covered, levels, weighting="official").reshape(1),
        "met.pu": std.mean().reshape(1),
        "met.coverage": covered,
        "met.ece_mean_abs": sal.calibration_error(covered, levels).reshape(1),
        "met.mu_ep": found.mean,
        "met.var_ep_ddof1": found.epistemic,
    }
