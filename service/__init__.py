"""The serving application. Never imports torch or `training`.

A clip's way, top to bottom: `routes/keywords.py` (`detect`) asks `runtime.py` for each step (`decode`, then `infer`),
which hands the clip to `batching.py` (`submit`); there a worker takes it (`_work`) and calls `engine.py` (`run`);
`detect` makes the answer of what comes back. Helpers of one step each: `intake.py` (the body), `audio.py` (its
samples), `keywords.py` (scores and times). Around all routes are `protocol.py` (bytes of a connection), `middleware.py`
(ids, times, faults) and `routes/direct.py` (which route).
"""
