"""A policy straight from preferences (DPO and its kin), without sampling."""
