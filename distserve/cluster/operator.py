"""What an operator may have done to a running launch; behind ``/admin`` of its endpoint."""

import asyncio
from typing import TYPE_CHECKING

from distserve.cluster.owner_backend import OwnerBackend
from distserve.core.config import Role

if TYPE_CHECKING:
    from distserve.cluster.deployment import Deployment


class ClusterOperator:
    """Implements :class:`distserve.api.admin.Operator`."""

    def __init__(self, backend: OwnerBackend, deployment: "Deployment") -> None:
        self._backend = backend
        self._deployment = deployment

    async def change_role(self, instance_id: str, role: Role, patience: float) -> None:
        """Connect what the role needs connected, have the router agree, and note it for replacements."""
        await asyncio.to_thread(self._deployment.prepare_role, instance_id, role)
        await self._backend.change_role(instance_id, role, patience)
        self._deployment.assume_role(instance_id, role)
