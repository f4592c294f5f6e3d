"""SALE: codes, statistics, scores of blocks, the kept blocks, the output and its error, all from public functions."""

from salience import kernels
from salience.methods.keys._sale_calibration import output_error
from salience.methods.keys._sale_scores import Grid, block_log_ras, quantise_key, quantise_query, statistics
from salience.methods.keys.sale import choose


def run(tensors, parameters):
    parameters = parameters.get("parameters", parameters)
    # the stored codes are those of float64: in fp32 a tie may round the other way
    query, key, value = (tensors[name].double() for name in ("q", "k", "v"))
    scaling = query.shape[-1] ** -0.5
    grid = Grid(
        q_block=parameters["block_q"],
        k_block=parameters["block_k"],
        local_window=parameters["local_window"],
        segment=parameters["segment"],
    )
    key_centred = key - key.mean(2, keepdim=True)
    query_codes, query_scale = quantise_query(query - query.mean(2, keepdim=True))
    key_codes, key_scale = quantise_key(key_centred, grid.k_block)
    row_max, row_sum = statistics(query, key_centred, grid, scaling=scaling)
    tau = tensors["tau"]
    blocks = choose(query, key, tau, scaling=scaling, grid=grid)
    out = kernels.attend(query, key, value, blocks, scaling=scaling)
    exact = kernels.dense.attend(query, key, value, scaling=scaling)
    return {
        "q_codes": query_codes,
        "k_codes": key_codes,
        "q_scale": query_scale,
        "k_scale": key_scale,
        "row_max": row_max,
        "row_sum": row_sum,
        "block_log_ras": block_log_ras(query, key, scaling=scaling, grid=grid),
        "block_mask": blocks.to_mask(),
        "out": out,
        "out_l1_err": output_error(exact, out),
    }


SKIPS = ("q", "k", "v", "tau")
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
