"""Task: makes the services and limits of deliveries from the configuration."""

import logging

import trio

from fxrelay.delivery.delivery import DeliveryLimits
from fxrelay.delivery.services import AnyService, Endpoint, PoolService, Service, ServiceTable, resolve
from fxrelay.service_settings import ServiceSection
from fxrelay.settings import RelaySettings
from fxtunnel.kit.settings import Address
from fxtunnel.model import ServiceName

logger = logging.getLogger(__name__)


async def resolved(sections: tuple[ServiceSection, ...], known: ServiceTable | None = None) -> list[AnyService]:
    """The services with their addresses on this node. A name that does not resolve now keeps the addresses it had."""
    services: list[AnyService] = []
    for section in sections:
        name = ServiceName(section.name)
        target = section.target if section.target is not None else Address(section.host, section.port)
        endpoints: tuple[Endpoint, ...]
        try:
            endpoints = await trio.to_thread.run_sync(resolve, target)
        except OSError as exc:
            old = known.get(name) if known is not None else None
            endpoints = old.endpoints if old is not None and old.target == target else ()
            logger.warning("target %s of service %s does not resolve: %s", target, section.name, exc.strerror or exc)
        if section.port is not None:
            wait_s = section.queue.wait_s if section.queue is not None else 0.0
            carried = (section.protocol, section.proxy_protocol)
            services.append(PoolService(name, section.host, section.port, endpoints, *carried, wait_s, section.is_guarded))
        else:
            services.append(Service(name, target, endpoints, section.protocol, section.proxy_protocol, section.is_guarded))
    return services


def delivery_limits(settings: RelaySettings, most_streams: int) -> DeliveryLimits:
    """The bounds of deliveries, of which there are `most_streams` at most, whatever the configuration says."""
    limits = settings.limits
    return DeliveryLimits(min(limits.streams, most_streams), limits.connect_timeout_s, limits.idle_timeout_s)
