"""The shard format: written, indexed, verified, read by range from anywhere."""
