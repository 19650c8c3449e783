// Play any number of battles at once: commands in on stdin, one JSON object a line; one reply a command out on stdout.
//
//   node simulator.cjs FOLDER        FOLDER contains node_modules with @pkmn/sim and @pkmn/randoms
//
//   {"id": 1, "format": "gen1ou"}                        -> {"id": 1, "generation": 1, "has_random_teams": false, ...}
//   {"id": 2, "format": "gen1ou", "team": TEXT}          -> {"id": 2, "team": PACKED} or {"id": 2, "problems": [...]}
//   {"id": 3, "start": {"format", "seed", "players"}}    -> {"id": 3, "p1": LINES, "p2": LINES}
//   {"id": 3, "choose": {"p1": "move 1", "p2": null}}    -> {"id": 3, "p1": LINES, "p2": LINES}, at the end also "end"
//   {"id": 3, "stop": true}                              -> {"id": 3}
//
// What goes wrong in one battle is {"id": 3, "error": TEXT}, and ends that battle only.
'use strict';
const path = require('node:path');
const {createRequire} = require('node:module');

const requireInstalled = createRequire(path.join(path.resolve(process.argv[2]), 'node_modules', 'from-here.cjs'));
const {BattleStreams, Dex, TeamValidator, Teams, extractChannelMessages} = requireInstalled('@pkmn/sim');
const {TeamGenerators} = requireInstalled('@pkmn/randoms');
Teams.setGeneratorFactory(TeamGenerators);

// The stream runs what follows ">eval" as JavaScript, so that nothing but these choices may be written into it.
const CHOICE = /^(move [1-4]( terastallize)?|switch [1-6]|team [1-6]{1,6})$/;

// "t:" is the time of the clock, the only line in which two battles with the same seeds differ.
const isNoTime = line => !line.startsWith('|t:|');

const battles = new Map();

// A battle whose messages are kept until they are fetched, instead of being read asynchronously.
class KeptBattle extends BattleStreams.BattleStream {
  constructor() {
    super({noCatch: true, keepAlive: true});
    this.reply = {p1: [], p2: []};
  }

  pushMessage(type, data) {
    if (type === 'update') {
      const lines = extractChannelMessages(data, [1, 2]);
      this.reply.p1.push(...lines[1].filter(isNoTime));
      this.reply.p2.push(...lines[2].filter(isNoTime));
    } else if (type === 'sideupdate') {
      this.reply[data.slice(0, 2)].push(data.slice(3));
    } else if (type === 'end') {
      const {winner, turns, p1, p2} = JSON.parse(data);
      const role = {[p1]: 'p1', [p2]: 'p2'}[winner] || null; // "" in a tie
      const log = extractChannelMessages(this.battle.log.join('\n'), [0])[0].filter(isNoTime);
      this.reply.end = {winner: role, turns, log: log.join('\n')};
    }
  }

  writeNow(line) {
    this._write(line);
  }

  fetch() {
    const {p1, p2, ...rest} = this.reply;
    this.reply = {p1: [], p2: []};
    return {p1: p1.join('\n'), p2: p2.join('\n'), ...rest};
  }
}

function describe(name) {
  const format = Dex.formats.get(name);
  if (!format.exists || format.effectType !== 'Format') return {problems: ['no such format']};
  const rules = Dex.formats.getRuleTable(format);
  return {
    format_id: format.id,
    generation: Dex.forFormat(format).gen,
    game_type: format.gameType,
    has_random_teams: !!format.team,
    hides_exact_hp: rules.has('hppercentagemod'),
  };
}

function validate(name, text) {
  const team = Teams.import(text);
  if (!team || !team.length) return {problems: ['no team']};
  const problems = TeamValidator.get(name).validateTeam(team); // fills in EVs, IVs and abilities
  return problems ? {problems} : {team: Teams.pack(team)};
}

function start(id, {format, seed, players}) {
  const battle = new KeptBattle();
  battle.writeNow(`>start ${JSON.stringify({formatid: format, seed})}`);
  for (const [slot, player] of Object.entries(players)) battle.writeNow(`>player ${slot} ${JSON.stringify(player)}`);
  battles.set(id, battle);
  return battle.fetch();
}

function choose(id, choices) {
  const battle = battles.get(id);
  for (const [slot, choice] of Object.entries(choices)) {
    if (choice === null) continue;
    if (!CHOICE.test(choice) || !/^p[12]$/.test(slot)) throw new Error(`not a choice: ${slot} ${choice}`);
    battle.writeNow(`>${slot} ${choice}`);
  }
  const reply = battle.fetch();
  if (reply.end) stop(id);
  return reply;
}

function stop(id) {
  const battle = battles.get(id);
  if (battle) battle._destroy();
  battles.delete(id);
  return {};
}

function answer({id, format, team, start: setup, choose: choices}) {
  try {
    if (setup) return start(id, setup);
    if (choices) return choose(id, choices);
    if (team !== undefined) return validate(format, team);
    return format === undefined ? stop(id) : describe(format);
  } catch (error) {
    stop(id);
    return {error: `${error && error.message}`};
  }
}

let rest = '';
process.stdin.setEncoding('utf8');
process.stdin.on('data', chunk => {
  const lines = (rest + chunk).split('\n');
  rest = lines.pop();
  const replies = lines.map(line => {
    const command = JSON.parse(line);
    return JSON.stringify({id: command.id, ...answer(command)}) + '\n';
  });
  if (replies.length) process.stdout.write(replies.join(''));
});
process.stdin.on('end', () => process.exit(0));
process.on('SIGINT', () => {}); // Ctrl-C reaches the parent, which closes stdin
