#!/bin/bash
# @pkmn/sim 0.10.11: the same seed and the same choices do not give the same log.
#
# Assumed: a battle is a function of its seed, its teams and the choices, so logs can be compared or hashed.
# What happens: the log has lines `|t:|` with the clock's seconds, one at the start and one a turn, seeded or not.
#
# Seen with @pkmn/sim 0.10.11, @pkmn/randoms 0.10.6, Node.js 20 (2026-11-30):
#   two battles of one seed, two seconds apart: same log: false; same without the lines of |t:|: true
# Way round: leave these lines out before comparing.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
npm install --silent --no-audit --no-fund --ignore-scripts @pkmn/sim@0.10.11 @pkmn/randoms@0.10.6 >/dev/null
cat >battle.cjs <<'J'
const {BattleStreams, RandomPlayerAI, Teams} = require('@pkmn/sim');
const {TeamGenerators} = require('@pkmn/randoms');
Teams.setGeneratorFactory(TeamGenerators);

async function play() {
    const streams = BattleStreams.getPlayerStreams(new BattleStreams.BattleStream());
    const log = [];
    const reading = (async () => { for await (const chunk of streams.omniscient) log.push(chunk); })();
    for (const [number, side] of ['p1', 'p2'].entries()) {
        const player = new RandomPlayerAI(streams[side], {seed: [1, 2, 3, number + 4]});
        void player.start();
    }
    void streams.omniscient.write(`>start ${JSON.stringify({formatid: 'gen1randombattle', seed: [1, 2, 3, 4]})}\n` +
        `>player p1 ${JSON.stringify({name: 'one', seed: [1, 1, 1, 1]})}\n` +
        `>player p2 ${JSON.stringify({name: 'two', seed: [2, 2, 2, 2]})}`);
    await reading;
    return log.join('\n').split('\n');
}

(async () => {
    const first = await play();
    await new Promise(resolve => setTimeout(resolve, 2000));
    const second = await play();
    const timeless = lines => lines.filter(line => !line.startsWith('|t:|')).join('\n');
    const same = first.join('\n') === second.join('\n'), sameWithout = timeless(first) === timeless(second);
    console.log(`two battles of one seed, two seconds apart: same log: ${same}; same without the lines of |t:|: ${sameWithout}`);
    process.exit(!same && sameWithout && first.length > 50 ? 0 : 1);
})();
J
node battle.cjs || { echo "the behaviour changed"; exit 1; }
