"""What the configuration means for HTTP services."""

import pytest

from fxrelay.service_settings import ServiceSection
from fxrelay.web.composing import files_of_a_stream

SHELL = ServiceSection(name="shell", port=22)
SITE = ServiceSection.model_validate({"name": "site", "protocol": "http", "target": "127.0.0.1:80"})
DESK = ServiceSection(name="desk", protocol="http", port=8_080)


@pytest.mark.parametrize(("sections", "files"), [((), 1), ((SHELL, SITE), 1), ((SHELL, DESK), 5)])
def test_connections_to_a_pool_hold_links_to_several_nodes(sections: tuple[ServiceSection, ...], files: int) -> None:
    assert files_of_a_stream(sections) == files
