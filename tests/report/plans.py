"""The JSON of a plan, for tests of reports and cards."""


def layer(index, keys=2, composition="head", after=64):
    return {
        "layer": index,
        "key_components": keys,
        "value_components": keys,
        "key_composition": composition,
        "value_composition": composition,
        "kv_bytes_per_token": {"before": 128, "after": after},
    }


PLAN = {
    "kv_bytes_per_token": {"before": 512, "after": 320},
    "parameters": {"before": 105_000_000, "after": 104_000_000},
    "layers": [layer(0, 4, None, 128), layer(1), layer(2), layer(3)],
}
