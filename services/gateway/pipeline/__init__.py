"""Durable execution of jobs: the only package that knows the workflow engine; others see `Pipeline`."""

from services.gateway.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
