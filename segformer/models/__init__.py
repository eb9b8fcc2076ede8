"""The network: torch only, on one device."""
