"""Imports Lightning without what torchmetrics imports only where it is installed, as it is here: a third of the time.

Processes that tests start, and workers of Ray, import Lightning for the modules of ``problems`` and need nothing else of it.
"""

from unittest import mock

from lightning_utilities.core import imports

SLOW = ("matplotlib", "scipy", "transformers")
met, available = imports.RequirementCache.__bool__, imports.package_available


def met_quickly(requirement: imports.RequirementCache) -> bool:
    return not str(requirement.requirement).startswith(SLOW) and met(requirement)


with (
    mock.patch.object(imports.RequirementCache, "__bool__", met_quickly),
    mock.patch.object(imports, "package_available", lambda name: name not in SLOW and available(name)),
):
    import torchmetrics  # noqa: F401
