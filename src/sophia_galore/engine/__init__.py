"""The layer-wise step: layers outside, micro-batches inside."""
