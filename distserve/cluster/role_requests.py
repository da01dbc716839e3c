"""Asking the router to change an instance's role: one answer to each question, or none if it is silent."""

import asyncio

from distserve.cluster.driver import Network
from distserve.core.config import Role
from distserve.core.errors import ConflictError, UnavailableError, UnknownInstanceError
from distserve.core.messages import ChangeRole, RoleAnswer
from distserve.core.scheduler import ROUTER

ANSWER_PATIENCE = 10.0
"""Seconds after which a router that has said nothing counts as silent."""


class RoleRequests:
    """The questions of one part, all on one event loop; ``network`` carries them."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._waiting: dict[tuple[str, Role], list[asyncio.Future[RoleAnswer]]] = {}

    async def ask(self, change: ChangeRole) -> None:
        """Return once the router has agreed, which is before the instance has changed.

        Raises:
            UnknownInstanceError: there is no such instance.
            ConflictError: it cannot be; says why.
            UnavailableError: the router does not answer.
        """
        answer: asyncio.Future[RoleAnswer] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault((change.instance_id, change.role), [])
        waiting.append(answer)
        self._network.send(ROUTER, change)
        try:
            said = await asyncio.wait_for(answer, ANSWER_PATIENCE)
        except TimeoutError as error:
            raise UnavailableError("the router does not answer: it may be starting, try again") from error
        finally:
            if answer in waiting:
                waiting.remove(answer)
        if said.status == 404:
            raise UnknownInstanceError(said.reason)
        if said.status != 202:
            raise ConflictError(said.reason)

    def on_answer(self, answer: RoleAnswer) -> None:
        """The router said this; answers come in the order of the questions."""
        waiting = self._waiting.get((answer.instance_id, answer.role))
        if waiting:
            waiting.pop(0).set_result(answer)
