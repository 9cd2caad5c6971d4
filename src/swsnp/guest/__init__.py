"""The guest kernel's part: GHCB, secrets page, message channel and the sev-guest driver.

Read in this order: `boot`, `ghcb_page`, `secrets`, `channel`, `exchange`, `driver`.
"""
