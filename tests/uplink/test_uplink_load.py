"""What an uplink tells its gateway of how well this relay could take a stream."""

from pathlib import Path

from uplink_fakes import FakeGateway, LongestWaits, running, until

from fxrelay.uplink.uplink import UplinkEnvironment


async def test_a_gateway_hears_at_once_that_others_are_better_asked(gateway: FakeGateway, state_dir: Path) -> None:
    moods = [False]
    environment = UplinkEnvironment(LongestWaits(), is_reluctant=lambda: moods[-1])
    async with running(gateway, state_dir, environment=environment):
        for mood in (True, False, True):
            await until(lambda: [load.reluctant for load in gateway.loads] == moods)
            moods.append(mood)
        await until(lambda: [load.reluctant for load in gateway.loads] == moods)
        gateway.cut_control()  # the next link begins with it
        await until(lambda: [load.reluctant for load in gateway.loads] == [*moods, True])
