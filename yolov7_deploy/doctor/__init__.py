"""Diagnosis: what is installed, what the machine has, what can run here, and how to install the rest."""

from yolov7_deploy.doctor.doctor import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
