"""The verifier of NVIDIA GPUs and NVSwitches: reports, manifests and NRAS tokens to an appraisal; no network."""
