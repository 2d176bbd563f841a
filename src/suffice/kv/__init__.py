"""KV cache compression: a cache for unmodified `generate`, eviction policies, and measurements of what they cost.

`CompressedCache` is the cache, `policies` lists what it can keep, `Policy` composes new policies from
`suffice.kv.policy.weights`, `suffice.kv.policy.directions` and `suffice.kv.policy.estimators`.
"""

import lazy_loader

# The public names are listed in __init__.pyi and imported on first use, because transformers takes seconds to import.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
