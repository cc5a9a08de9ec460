"""The ways in which the keys and the values of a layer can divide its budget."""

from dataclasses import replace

from mea_compress.planning.types import LayerPlan, LayerSpec, Plan

# Shares of a layer's components that keys get, besides the even one.
_KEY_SHARES = (0.3, 0.4, 0.6, 0.7)


def kv_split_candidates(layer: LayerPlan, plan: Plan) -> list[LayerPlan]:
    """Return other ways to divide the layer's components between keys and values; the even split is the layer's own."""
    key, value = layer.spec.key, layer.spec.value
    total = key.components + value.components
    fractional = key.form.fractional
    geometry = plan.source.geometry(layer.layer)
    if geometry is None or geometry.head_dim != geometry.value_dim:
        return []
    step = 2 / geometry.head_dim if fractional else 1
    tried, candidates = {key.components}, []
    for share in _KEY_SHARES:
        count = max(1, round(total * share / step)) * step
        keys = count if fractional else int(count)
        if keys not in tried and total - keys > 0 and max(keys, total - keys) <= geometry.heads:
            tried.add(keys)
            spec = LayerSpec(replace(key, components=keys), replace(value, components=total - keys))
            candidates.append(replace(layer, spec=spec))
    return candidates
