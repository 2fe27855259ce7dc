"""InternVideo3: evaluate, profile and train M²LA video-language models.

The rooms (`harness`, `training`, `model`, `kernels`, `tasks`, `reports`) are real folders at the
top of the repository; this package holds one relative link to each. Importing it is cheap: torch,
transformers and lmms-eval are imported only by the rooms that use them.
"""

__version__ = "0.1.0"
