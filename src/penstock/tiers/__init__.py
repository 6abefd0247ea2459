"""Bytes of the KV tiers below the device: host arena, disk and Redis stores, copies between device and arena."""
