/* The toy game for the Game Boy Advance: the rules of pokegemma/play/toy/world.py, played in one room.

   Pictures come from the room, which pokegemma/play/rom/build.py draws and appends. They are palette indices, 0 is
   transparent. Each picture is drawn to the page of mode 4 that is not shown, and shown when it is complete. */

typedef signed short s16;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define REGISTER(offset) (*(volatile u16 *)(0x04000000 + (offset)))
#define DISPLAY_CONTROL REGISTER(0x000)
#define DISPLAY_STATUS REGISTER(0x004)
#define KEYS REGISTER(0x130)
#define INTERRUPT_ENABLE REGISTER(0x200)
#define INTERRUPT_FLAGS REGISTER(0x202)
#define WAIT_STATES REGISTER(0x204)
#define PALETTE ((volatile u16 *)0x05000000)
#define VIDEO_MEMORY 0x06000000u
#define PAGE_BYTES 0xa000u
#define SHOW_SECOND_PAGE 0x10
#define VBLANK_INTERRUPT 1

enum { KEY_A = 1, KEY_B = 2, KEY_SELECT = 4, KEY_START = 8, KEY_RIGHT = 16, KEY_LEFT = 32, KEY_UP = 64, KEY_DOWN = 128 };

enum { WIDTH = 240, HEIGHT = 160, TILE = 32, CENTRE_X = 104, CENTRE_Y = 64, MARGIN = 4, GROUND_WIDTH = 960 };
enum { STRIDE = 32, ROWS = 22, NUM_CELLS = STRIDE * ROWS, MAX_PLACES = 8, UNREACHED = 255, NOWHERE = 0xffff };
enum { TAP_FRAMES = 8, STEP_FRAMES = 16, SLIDE_FRAMES = 8 };
enum { PIXELS_A_DRAWING = 4 }; /* a step is drawn every other frame, so that rows of the ground are copied by words */

/* As in build.py, which writes them in these orders. */
enum { UP, DOWN, LEFT, RIGHT, NUM_DIRECTIONS };
enum { REDRAWN, PAINTED, NONE };
enum { NAVIGATION, SIGN, DIALOGUE, BELL, MENU, OFF_TRAIL, DONE };
enum {
    PLAYER, /* four, by direction */
    ARROW = PLAYER + NUM_DIRECTIONS, /* four, by direction */
    NEXT_CELL = ARROW + NUM_DIRECTIONS,
    TRAIL_DOT,
    PAINTED_CELL,
    SIGN_TILE,
    DOOR_TILE,
    SPEECH_CUE,
    BELL_CUE,
    TEXT_BOX,
    MENU_WINDOW,
    CLOSING, /* the whole screen when the room is done */
    NUM_SPRITES
};

struct sprite {
    s16 left, top;     /* from the tile's corner, or the screen's; `left` and `width` are even */
    u16 width, height;
    u32 pixels;        /* offset in the room */
};

/* Cells are row * STRIDE + column. */
struct room {
    u16 start, door;
    u16 signs[MAX_PLACES], bells[MAX_PLACES]; /* NOWHERE after the last; signs in the order of reading */
    u8 heading, trail;
    u8 directions[NUM_DIRECTIONS]; /* the order of preference among equally short ways */
    u8 marks_next;     /* whether the cell to step on is drawn as NEXT_CELL and the others as dots, or all alike */
    u8 reserved;
    u8 floor[NUM_CELLS];
    u16 palette[256];
    struct sprite sprites[NUM_SPRITES];
    u32 ground;        /* offset in the room of GROUND_WIDTH x GROUND_WIDTH pixels */
};

extern const struct room room;

/* For tests: the first bytes of the console's work memory, 0x02000000. */
struct state {
    u8 name[4];        /* "TOY1" */
    u8 column, row, facing, situation, signs_left, is_done;
    u8 is_busy;        /* the player walks, or a window slides in */
    u8 reserved;
    u32 num_frames;
};

__attribute__((section(".state"))) volatile struct state state;

static u16 player, unread[MAX_PLACES], silent_bells[MAX_PLACES];
static u16 trail[NUM_CELLS];  /* cells from `trail_start` to `trail_end`: the way to go, as it is drawn */
static u16 queue[NUM_CELLS];
static u8 distances[NUM_CELLS];
static int trail_start, trail_end;
static int facing, situation, window, bell_rings, arrow;
static int frames_walked, slide, frames_to_turn;
static u32 keys_before, page;

static int cell_beside(int cell, int direction)
{
    return direction == UP ? cell - STRIDE : direction == DOWN ? cell + STRIDE : direction == LEFT ? cell - 1 : cell + 1;
}

static int index_in(const u16 *places, int cell)
{
    for (int index = 0; index < MAX_PLACES; index++)
        if (places[index] == cell)
            return index;
    return -1;
}

static void remove_place(u16 *places, int index)
{
    for (; index < MAX_PLACES - 1; index++)
        places[index] = places[index + 1];
    places[index] = NOWHERE;
}

static int target_cell(void)
{
    return unread[0] != NOWHERE ? unread[0] : room.door;
}

/* Fill `distances` with the steps to the nearest of the `count` cells with which `queue` begins. */
static void measure_distances(int count)
{
    for (int cell = 0; cell < NUM_CELLS; cell++)
        distances[cell] = UNREACHED;
    for (int index = 0; index < count; index++)
        distances[queue[index]] = 0;
    for (int first = 0; first < count; first++)
        for (int direction = 0; direction < NUM_DIRECTIONS; direction++) {
            int beside = cell_beside(queue[first], direction);
            if (room.floor[beside] && distances[beside] == UNREACHED) {
                distances[beside] = distances[queue[first]] + 1;
                queue[count++] = beside;
            }
        }
}

static int nearer_direction(int cell)
{
    for (int place = 0; place < NUM_DIRECTIONS; place++)
        if (distances[cell_beside(cell, room.directions[place])] == distances[cell] - 1)
            return room.directions[place];
    return UP;
}

/* Set the trail to a shortest way from the player to the next sign or the door. */
static void find_way(void)
{
    queue[0] = target_cell();
    measure_distances(1);
    trail_start = trail_end = 0;
    for (int cell = player; cell != target_cell(); trail[trail_end++] = cell)
        cell = cell_beside(cell, nearer_direction(cell));
}

static int is_beside_player(int cell)
{
    int direction = 0;
    while (direction < NUM_DIRECTIONS && cell != cell_beside(player, direction))
        direction++;
    return direction < NUM_DIRECTIONS;
}

static int num_painted_beside(void)
{
    int count = 0;
    for (int index = trail_start; index < trail_end; index++)
        count += is_beside_player(trail[index]);
    return count;
}

static int situation_now(void)
{
    if (player == room.door)
        return DONE;
    if (window)
        return window;
    if (bell_rings)
        return BELL;
    if (unread[0] == cell_beside(player, facing))
        return SIGN;
    return room.trail == PAINTED && num_painted_beside() != 1 ? OFF_TRAIL : NAVIGATION;
}

/* Follow a change of the rules' state: what is drawn now, and what tests read. */
static void refresh(void)
{
    situation = situation_now();
    if (situation == NAVIGATION && room.trail == REDRAWN)
        find_way();
    if (situation == OFF_TRAIL) {
        for (int index = trail_start; index < trail_end; index++)
            queue[index - trail_start] = trail[index];
        measure_distances(trail_end - trail_start);
        arrow = nearer_direction(player);
    }
    int num_unread = 0;
    while (num_unread < MAX_PLACES && unread[num_unread] != NOWHERE)
        num_unread++;
    state.column = player % STRIDE;
    state.row = player / STRIDE;
    state.facing = facing;
    state.situation = situation;
    state.signs_left = num_unread;
    state.is_done = situation == DONE;
}

static void step_on(int cell)
{
    player = cell;
    for (int index = trail_start; room.trail == PAINTED && index < trail_end; index++)
        if (trail[index] == cell)
            trail_start = index + 1;
    int bell = index_in(silent_bells, cell);
    if (bell >= 0) {
        remove_place(silent_bells, bell);
        bell_rings = 1;
    }
}

static void read_sign(void)
{
    int sign = index_in(unread, cell_beside(player, facing));
    if (sign < 0)
        return;
    remove_place(unread, sign);
    if (sign == 0 && room.trail == PAINTED)
        find_way();
}

static int held_direction(u32 keys)
{
    return keys & KEY_UP ? UP : keys & KEY_DOWN ? DOWN : keys & KEY_LEFT ? LEFT : keys & KEY_RIGHT ? RIGHT : -1;
}

/* Turn the player, and walk if the direction is held for more than a tap; return whether the picture changes. */
static int walk(int direction)
{
    if (direction != facing) {
        facing = direction;
        frames_to_turn = TAP_FRAMES;
        refresh();
        return 1;
    }
    if (frames_to_turn && --frames_to_turn)
        return 0;
    int cell = cell_beside(player, direction);
    if (!room.floor[cell] && !(cell == room.door && unread[0] == NOWHERE))
        return 0;
    frames_walked = 1;
    return 1;
}

static int answer_keys(u32 keys)
{
    u32 pressed = keys & ~keys_before;
    int direction = held_direction(keys);
    keys_before = keys;
    if (direction != facing)
        frames_to_turn = 0;
    if (situation == DONE)
        return 0;
    if (window) {
        if (!(pressed & (window == DIALOGUE ? KEY_B : KEY_SELECT)))
            return 0;
        if (window == DIALOGUE)
            read_sign();
        else
            bell_rings = 0;
        window = 0;
    } else if (direction >= 0) {
        return walk(direction);
    } else if (pressed & KEY_START || (pressed & KEY_A && index_in(room.signs, cell_beside(player, facing)) >= 0)) {
        window = pressed & KEY_START ? MENU : DIALOGUE;
        slide = SLIDE_FRAMES;
    } else {
        return 0;
    }
    refresh();
    return 1;
}

/* Let the game go on by one frame; return whether the picture changes. */
static int advance(u32 keys)
{
    int changes = 1;
    if (slide) {
        slide--;
    } else if (frames_walked) {
        changes = ++frames_walked % 2;
        if (frames_walked == STEP_FRAMES) {
            frames_walked = 0;
            step_on(cell_beside(player, facing));
            refresh();
            changes = 1;
        }
    } else {
        changes = answer_keys(keys);
    }
    state.is_busy = frames_walked || slide;
    state.num_frames++;
    return changes;
}

/* In fast memory, as ARM code optimised for speed: a window of 104x152 pixels is drawn within a frame. */
__attribute__((section(".iwram"), target("arm"), optimize("O2"), noinline, long_call))
static void draw_sprite(int number, int x, int y)
{
    const struct sprite *sprite = &room.sprites[number];
    int width = sprite->width, left = x + sprite->left, top = y + sprite->top;
    int first_row = top < 0 ? -top : 0, first_column = left < 0 ? -left : 0;
    int num_rows = top + sprite->height > HEIGHT ? HEIGHT - top : sprite->height;
    int num_columns = left + width > WIDTH ? WIDTH - left : width;
    const u8 *pixels = (const u8 *)&room + sprite->pixels;
    for (int row = first_row; row < num_rows; row++) {
        const u16 *source = (const u16 *)(pixels + row * width + first_column);
        const u16 *end = (const u16 *)(pixels + row * width + num_columns);
        u16 *target = (u16 *)(page + (top + row) * WIDTH + left + first_column);
        for (; source < end; source++, target++) {
            u32 pair = *source;
            if (pair & 0xff && pair >> 8)
                *target = pair;
            else if (pair & 0xff)
                *target = pair | (*target & 0xff00);
            else if (pair)
                *target = pair | (*target & 0xff);
        }
    }
}

static void draw_trail(int x, int y)
{
    for (int index = trail_end - 1; index >= trail_start; index--) {
        int cell = trail[index];
        int left = x + (cell % STRIDE - player % STRIDE) * TILE, top = y + (cell / STRIDE - player / STRIDE) * TILE;
        int is_next = situation == NAVIGATION && is_beside_player(cell);
        draw_sprite(!room.marks_next ? PAINTED_CELL : is_next ? NEXT_CELL : TRAIL_DOT, left, top);
        if (index_in(room.signs, cell) >= 0)
            draw_sprite(SIGN_TILE, left, top);
        else if (cell == room.door)
            draw_sprite(DOOR_TILE, left, top);
    }
}

/* Copy the screen's part of the ground by ten words at a time; `left` is a multiple of 4. DMA takes mGBA twice as long. */
__attribute__((section(".iwram"), target("arm"), noinline, long_call)) static void draw_ground(int left, int top)
{
    u32 source = (u32)&room + room.ground + top * GROUND_WIDTH + left, target = page;
    for (int row = 0; row < HEIGHT; row++) {
        for (u32 end = target + WIDTH; target < end;)
            __asm__ volatile("ldmia %0!, {r2-r10, r12}\n\tstmia %1!, {r2-r10, r12}"
                             : "+&r"(source), "+&r"(target)
                             :: "r2", "r3", "r4", "r5", "r6", "r7", "r8", "r9", "r10", "r12", "memory");
        source += GROUND_WIDTH - WIDTH;
    }
}

static void draw(void)
{
    int walked = (frames_walked + 1) / 2 * PIXELS_A_DRAWING;
    int x = facing == RIGHT ? walked : facing == LEFT ? -walked : 0;
    int y = facing == DOWN ? walked : facing == UP ? -walked : 0;
    if (situation == DONE) {
        draw_sprite(CLOSING, 0, 0);
        return;
    }
    draw_ground((player % STRIDE + MARGIN) * TILE - CENTRE_X + x, (player / STRIDE + MARGIN) * TILE - CENTRE_Y + y);
    if ((situation == NAVIGATION && room.trail != NONE) || situation == OFF_TRAIL)
        draw_trail(CENTRE_X - x, CENTRE_Y - y);
    draw_sprite(PLAYER + facing, CENTRE_X, CENTRE_Y);
    if (situation == OFF_TRAIL)
        draw_sprite(ARROW + arrow, 0, 0);
    else if (situation == SIGN)
        draw_sprite(SPEECH_CUE, 0, 0);
    else if (situation == BELL)
        draw_sprite(BELL_CUE, 0, 0);
    else if (situation == DIALOGUE)
        draw_sprite(TEXT_BOX, 0, slide * 8);
    else if (situation == MENU)
        draw_sprite(MENU_WINDOW, slide * 14, 0);
}

/* Halt until the next picture is complete. Interrupts only end the halt: none is ever served. */
static void wait_for_vblank(void)
{
    INTERRUPT_FLAGS = VBLANK_INTERRUPT;
    __asm__ volatile("swi 2" ::: "r0", "r1", "r2", "r3", "memory");
}

static void start_room(void)
{
    for (int index = 0; index < MAX_PLACES; index++) {
        unread[index] = room.signs[index];
        silent_bells[index] = room.bells[index];
    }
    for (int index = 0; index < 4; index++)
        state.name[index] = "TOY1"[index];
    state.num_frames = state.is_busy = state.reserved = 0;
    player = room.start;
    facing = room.heading;
    if (room.trail == PAINTED)
        find_way();
    step_on(player);
    refresh();
}

int main(void)
{
    WAIT_STATES = 0x4317; /* the fastest reading that cartridges allow */
    DISPLAY_STATUS = 8;   /* ask for an interrupt at each vertical blank */
    INTERRUPT_ENABLE = VBLANK_INTERRUPT;
    for (int index = 0; index < 256; index++)
        PALETTE[index] = room.palette[index];
    start_room();
    u32 shown = SHOW_SECOND_PAGE;
    for (int changes = 1;; changes = advance(~KEYS)) {
        if (changes) {
            shown ^= SHOW_SECOND_PAGE;
            page = VIDEO_MEMORY + (shown ? PAGE_BYTES : 0);
            draw();
        }
        wait_for_vblank();
        DISPLAY_CONTROL = 0x0404 | shown;
    }
}
